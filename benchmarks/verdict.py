"""Whether what an index believes is so: maps of part of Gardens Point, queries of which half show no place of the map.

`python -m benchmarks.verdict --weights vits14.safetensors --data-root DATA [--json FILE]`. A map is a run of frames of
day_right; queries are all frames of other walks. A place is right within 2 frames.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
import tyro

from benchmarks.report import print_table, write_json
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.photo_list import list_source
from trainer.pretrained import load

TOLERANCE = 2


@dataclass(frozen=True)
class Options:
    """What is measured."""

    weights: str
    """The network, as `rerankvpr index build --checkpoint` takes it."""
    data_root: Path
    """Folder that holds gardens_point/."""
    maps: tuple[str, ...] = ("0-99", "100-199", "50-149")
    """Frames of day_right that each map is made of."""
    queries: tuple[str, ...] = ("night_right", "day_left")
    """Walks that are located."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """Builds, locates, counts."""
    options = tyro.cli(Options, description=__doc__)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    describer, walks = load(options.weights), options.data_root / "gardens_point"
    listed = list_source(str(walks / "day_right"))
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for span in options.maps:
        low, high = map(int, span.split("-"))
        with tempfile.TemporaryDirectory() as folder:
            build_index(describer, listed.part(range(low, high + 1)), Path(folder) / "index")
            index = Index.open(Path(folder) / "index", network=describer)
            for walk in options.queries:
                names = list_source(str(walks / walk)).names
                found = index.locate([walks / walk / name for name in names])
                frame_Q = np.arange(len(found))
                believed_Q = np.array([bool(one.in_map) for one in found])
                first_Q = low + np.array([one.candidates[0].number for one in found])
                right_Q = np.abs(first_Q - frame_Q) <= TOLERANCE
                inside_Q = (frame_Q >= low - TOLERANCE) & (frame_Q <= high + TOLERANCE)
                shares = {
                    "believed_in_map": inside_Q[believed_Q],
                    "in_map_believed": believed_Q[inside_Q],
                    "believed_right": right_Q[believed_Q],
                    "right_believed": believed_Q[right_Q & inside_Q],
                    "outside_believed": believed_Q[~inside_Q],
                    "unbelieved_outside": ~inside_Q[~believed_Q],
                    "outside_unbelieved": ~believed_Q[~inside_Q],
                }
                told = {name: 100 * float(share.mean()) if len(share) else 0.0 for name, share in shares.items()}
                figures |= {f"{span}_{walk}_{name}": value for name, value in told.items()}
                figures[f"{span}_{walk}_threshold"] = index.threshold
                rows.append([f"{span}, {walk}", f"{index.threshold:.3f}", *(f"{value:.1f}" for value in told.values())])
    columns = ["map, queries", "threshold", "believed: in map", "in map: believed", "believed: right"]
    columns += ["right: believed", "outside: believed", "not believed: outside", "outside: not believed"]
    print_table("Verdicts, percent", columns, rows)
    write_json(options.json, figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
