"""Benchmarks: database, queries, positives, and the protocol that a recall belongs to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RADIUS_M = 25.0
GARDENS_TRAVERSES = ("day_left", "day_right", "night_right")
GARDENS_PAIRS = (("day_right", "night_right"), ("day_left", "night_right"), ("day_right", "day_left"))
GARDENS_TOLERANCE = 2
GARDENS_FRAMES = 200


@dataclass(frozen=True)
class Benchmark:
    """Queries to be found in a database; query q's positives are positive_ids[offsets[q] : offsets[q + 1]]."""

    name: str
    protocol: str
    database: list[Path]
    queries: list[Path]
    positive_offsets: NDArray[np.int64]
    positive_ids: NDArray[np.int64]

    def positives(self, query: int) -> NDArray[np.int64]:
        """Database numbers that show the place of a query, ascending."""
        return self.positive_ids[self.positive_offsets[query] : self.positive_offsets[query + 1]]


def load_benchmarks(specs: list[str], data_root: Path) -> list[Benchmark]:
    """The benchmarks that the specs name, from their folders under `data_root`; a spec may stand for several.

    Raises ValueError naming the nearest known benchmark, FileNotFoundError naming the folder that is missing.
    """
    found = []
    for spec in specs:
        name, *options = spec.split("/")
        if name not in BENCHMARKS:
            raise ValueError(f"unknown benchmark {name!r}; {_nearest(name, list(BENCHMARKS))}")
        folder = data_root / name
        if not folder.is_dir():
            raise FileNotFoundError(f"benchmark {name}: no folder {name} in the data root {data_root}")
        found += BENCHMARKS[name](folder, options)
    return found


def utm_benchmark(name: str, folder: Path, radius_m: float = RADIUS_M) -> Benchmark:
    """The field's folder convention: `images/test/{database,queries}/@UTM_east@UTM_north@...@.jpg`.

    Positives lie within `radius_m` metres; a query without one counts as a miss (VPR-methods-evaluation).
    """
    parts = {part: _images(folder / "images" / "test" / part, "**/*.jpg") for part in ("database", "queries")}
    database_D2, queries_Q2 = (np.array([_utm(path) for path in paths]) for paths in parts.values())
    positives = [_within(query_2, database_D2, radius_m) for query_2 in queries_Q2]
    return _benchmark(name, f"{radius_m:g} m radius, all queries", parts["database"], parts["queries"], positives)


def _utm(path: Path) -> tuple[float, float]:
    fields = path.name.split("@")
    try:
        return float(fields[1]), float(fields[2])
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path}: expected a name like @UTM_east@UTM_north@...@.jpg") from error


def _within(query_2: NDArray[np.float64], database_D2: NDArray[np.float64], radius_m: float) -> NDArray[np.int64]:
    return np.flatnonzero(((database_D2 - query_2) ** 2).sum(axis=1) <= radius_m**2)


def _town(folder: Path, options: list[str]) -> list[Benchmark]:
    if options:
        raise ValueError(f"benchmark town takes no options, got {'/'.join(options)!r}")
    return [utm_benchmark("town", folder)]


def _gardens_point(folder: Path, options: list[str]) -> list[Benchmark]:
    """`gardens_point[/DATABASE/QUERY][/FIRST-LAST]`: frame i of a traverse shows the place of frame i of the others."""
    first, last = 0, GARDENS_FRAMES - 1
    if options and re.fullmatch(r"\d+-\d+", options[-1]):
        first, last = (int(number) for number in options.pop().split("-"))
    if not first <= last < GARDENS_FRAMES:
        raise ValueError(f"gardens_point: frames {first}-{last} are out of range; use FIRST-LAST within 0-199")
    for traverse in options:
        if traverse not in GARDENS_TRAVERSES:
            raise ValueError(f"gardens_point: unknown traverse {traverse!r}; {_nearest(traverse, GARDENS_TRAVERSES)}")
    if len(options) not in (0, 2):
        raise ValueError("gardens_point: expected gardens_point[/DATABASE/QUERY][/FIRST-LAST]")
    if options and options[0] == options[1]:
        raise ValueError(f"gardens_point: {options[0]} against itself finds every query; name two traverses")
    pairs = [(options[0], options[1])] if options else GARDENS_PAIRS
    is_part = (first, last) != (0, GARDENS_FRAMES - 1)
    frames = f"{first}-{last}"
    positives = [
        np.arange(max(first, i - GARDENS_TOLERANCE), min(last, i + GARDENS_TOLERANCE) + 1) - first
        for i in range(first, last + 1)
    ]
    return [
        _benchmark(
            f"gardens_point/{database}/{query}" + (f"/{frames}" if is_part else ""),
            f"+-{GARDENS_TOLERANCE} frames, frames {frames}",
            _traverse(folder / database)[first : last + 1],
            _traverse(folder / query)[first : last + 1],
            positives,
        )
        for database, query in pairs
    ]


def _traverse(folder: Path) -> list[Path]:
    paths = _images(folder, "*.jpg")
    if len(paths) != GARDENS_FRAMES:
        raise ValueError(f"{folder} holds {len(paths)} frames; Gardens Point has {GARDENS_FRAMES} a traverse")
    return paths


def _images(folder: Path, pattern: str) -> list[Path]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no .jpg images in {folder}")
    return paths


def _benchmark(
    name: str, protocol: str, database: list[Path], queries: list[Path], positives: list[NDArray[np.int64]]
) -> Benchmark:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in positives])]).astype(np.int64)
    return Benchmark(name, protocol, database, queries, offsets, np.concatenate(positives).astype(np.int64))


def _nearest(name: str, names: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"nearest: {close[0]}" if close else f"known: {', '.join(names)}"


BENCHMARKS: dict[str, Callable[[Path, list[str]], list[Benchmark]]] = {"town": _town, "gardens_point": _gardens_point}
