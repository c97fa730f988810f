"""Peak memory of real trainings beside what `rerankvpr plan` says of them; ViT-g/14 under ZeRO-3 with offload.

Measured is the greatest RssAnon of a rank's process (anonymous memory: what is mapped from files, such as libraries, is
not in it), read every 20 ms from its start to its end, for trainings of three steps on images of noise.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
import yaml
from PIL import Image

from benchmarks.peak_memory import status_mb
from benchmarks.report import print_table, write_json
from configs.load import load_recipe
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from trainer.plan import Assumed, plan

POLL_S = 0.02
STEPS = 3
PLACES = 12

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "vitg14, ZeRO 3, offload all": {
        "data": {"places_per_batch": 4, "images_per_place": 2, "image_size": 112},
        "model": {"backbone": "vitg14", "finetune_last_n_blocks": 2},
        "engine": {"zero_stage": 3, "offload": "all"},
    },
}
for stage in (1, 3):
    for checkpointing in (False, True):
        name = f"vitb14, ZeRO {stage}" + (", activation checkpointing" if checkpointing else "")
        CASES[name] = {
            "data": {"places_per_batch": 4, "images_per_place": 4, "image_size": 224},
            "model": {"backbone": "vitb14", "finetune_last_n_blocks": 6},
            "engine": {"zero_stage": stage, "activation_checkpointing": checkpointing},
        }


@dataclass(frozen=True)
class Options:
    """Trains three steps of each case on gloo and holds the greatest memory of a rank against the planned run's."""

    ranks: int = 2
    """Ranks, all on this machine."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Cases to run, or the beginnings of their names."""
    measured: Path | None = None
    """File of an earlier run, whose measured figures are held against the planned run's instead of training again."""
    json: Path | None = None
    """File for the figures."""


def write_noise(folder: Path, *, places: int = PLACES, size: tuple[int, int] = (160, 120)) -> None:
    """A shard set in `folder`/shards: places of four JPEGs of noise, width x height."""
    rng = np.random.default_rng(0)
    (folder / "native" / "Dataframes").mkdir(parents=True)
    images = folder / "native" / "Images" / "Noise"
    images.mkdir(parents=True)
    rows = ["place_id,year,month,northdeg,city_id,lat,lon,panoid"]
    for place in range(places):
        for view in range(4):
            rows.append(f"{place},2020,{view + 1},0,Noise,1.5,2.5,p{place}-{view}")
            pixels = rng.integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize(size)
            picture.save(images / f"Noise_{place:07d}_2020_{view + 1:02d}_000_1.5_2.5_p{place}-{view}.jpg")
    (folder / "native" / "Dataframes" / "Noise.csv").write_text("\n".join(rows) + "\n")
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")


def write_recipe(folder: Path, case: Mapping[str, Mapping[str, Any]]) -> Path:
    """The recipe of a case: three steps, a queue, one checkpoint at the end, no evaluation."""
    recipe = {
        "name": "giant",
        "output": str(folder / "run"),
        "data": {"shards": str(folder / "shards"), "decode_threads": 1, **case["data"]},
        "model": {"weights": "random", **case["model"]},
        "memory": {"size": 1024, "start_epoch": 0},
        "engine": {"timeout_s": 1800, "stall_s": 1800, **case["engine"]},
        "trainer": {"epochs": 1, "max_steps": STEPS, "validate_every_epochs": 0, "checkpoint_every_steps": STEPS},
        "tracking": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process."""
    return int(status_mb("RssAnon", process.pid) * 2**20)


def peak_bytes(recipe: Path, ranks: int) -> list[float]:
    """Greatest RssAnon of each rank of a training of the recipe, run to its end."""
    flags = ["-m", "rerankvpr", "launch", "--nproc-per-node", str(ranks), "--", "train", str(recipe)]
    log = recipe.with_suffix(".log")
    with log.open("w") as out:
        launcher = subprocess.Popen([sys.executable, *flags], stdout=out, stderr=subprocess.STDOUT)
        peaks: dict[int, int] = {}
        while launcher.poll() is None:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                try:
                    if "trainer" in process.cmdline() or "train" in process.cmdline():
                        peaks[process.pid] = max(peaks.get(process.pid, 0), anonymous_bytes(process))
                except (psutil.Error, OSError, StopIteration):
                    continue  # it has ended
            time.sleep(POLL_S)
    if launcher.returncode:
        raise SystemExit(log.read_text()[-3000:])
    return sorted(map(float, peaks.values()), reverse=True)[:ranks]


def step_seconds(folder: Path) -> float:
    """Median seconds of the steps after the first."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["train/step_s"] for line in lines if "train/step_s" in line][1:])


def main() -> None:
    """Prints measured and predicted peaks of all cases."""
    options = tyro.cli(Options)
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    earlier: dict[str, float] = json.loads(options.measured.read_text()) if options.measured else {}
    for name, case in CASES.items():
        if not name.startswith(tuple(options.cases)):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_noise(folder)
            recipe = write_recipe(folder, case)
            predicted = plan(load_recipe(recipe), Assumed(ranks=options.ranks, tflops=1.0)).memory.device_peak
            if earlier:
                measured, seconds = earlier[f"{name}/measured_bytes"], earlier[f"{name}/step_s"]
            else:
                measured, seconds = max(peak_bytes(recipe, options.ranks)), step_seconds(folder)
        error = predicted / measured - 1
        rows.append([name, f"{measured / 1e9:.2f}", f"{predicted / 1e9:.2f}", f"{error:+.1%}", f"{seconds:.2f}"])
        figures |= {
            f"{name}/measured_bytes": measured,
            f"{name}/predicted_bytes": predicted,
            f"{name}/error": error,
            f"{name}/step_s": seconds,
        }
    columns = ["case", "measured GB", "predicted GB", "error", "s a step"]
    print_table(f"greatest memory of a rank, {options.ranks} ranks on gloo, {STEPS} steps", columns, rows)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
