"""From the names in a recipe to benchmarks that can be run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.names import nearest
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError
from eval.benchmarks.catalogue import CATALOGUE
from eval.benchmarks.layouts import manifest, utm_folder


def load_benchmarks(specs: list[str], data_root: Path) -> list[Benchmark]:
    """The benchmarks that the specs name, from their folders under `data_root`; a spec may stand for several.

    `NAME[/OPTION...]` is an entry of the catalogue, `folder:PATH[:METRES]` any folder in the UTM convention and
    `manifest:FILE[:METRES]` a table of one's own. Raises ValueError naming the nearest known benchmark,
    FileNotFoundError naming the folder that is missing.
    """
    found: list[Benchmark] = []
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if rest and kind in ("folder", "manifest"):
            path, radius_m = _path_and_radius(spec, rest)
            read = utm_folder if kind == "folder" else manifest
            found.append(read(path.name if kind == "folder" else path.stem, data_root / path, radius_m))
            continue
        name, *options = spec.split("/")
        if name not in CATALOGUE:
            known = [*CATALOGUE, "folder:PATH", "manifest:FILE"]
            raise ValueError(f"unknown benchmark {name!r}; {nearest(name, known)}")
        CATALOGUE[name].check(name, options)
        folder = data_root / name
        if not folder.is_dir():
            raise FileNotFoundError(f"benchmark {name}: no folder {name} in the data root {data_root}")
        found += CATALOGUE[name].load(folder, options)
    return [_checked(benchmark) for benchmark in found]


def _path_and_radius(spec: str, rest: str) -> tuple[Path, float]:
    path, colon, metres = rest.rpartition(":")
    if not colon:
        return Path(rest), RADIUS_M
    try:
        radius_m = float(metres)
    except ValueError:
        return Path(rest), RADIUS_M
    if not 0 < radius_m < float("inf"):
        raise ValueError(f"benchmark {spec}: the radius is {metres} m; expected a positive number")
    return Path(path), radius_m


def _checked(benchmark: Benchmark) -> Benchmark:
    """The benchmark if it can be run; a note where queries have no positive or are database images themselves."""
    if not benchmark.database or not benchmark.queries:
        empty = "queries" if benchmark.database else "database images"
        raise BenchmarkError(f"benchmark {benchmark.name}: no {empty}")
    if not len(benchmark.positive_ids):
        raise BenchmarkError(
            f"benchmark {benchmark.name}: none of {len(benchmark.queries)} queries has a positive "
            f"({benchmark.protocol}); do database and queries share a ground truth and a map zone?"
        )
    notes = list(benchmark.notes)
    if missing := benchmark.num_without_positive:
        first = benchmark.queries[int(np.argmax(np.diff(benchmark.positive_offsets) == 0))]
        notes.append(
            f"{missing} of {len(benchmark.queries)} queries have no positive and count as misses ({first.name})"
        )
    shared = set(benchmark.database) & set(benchmark.queries)
    if shared:
        notes.append(f"{len(shared)} queries are database images themselves ({min(shared).name}): each finds itself")
    return replace(benchmark, notes=tuple(notes))
