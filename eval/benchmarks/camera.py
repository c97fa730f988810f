"""Ground truth that cameras wrote: GPS in the EXIF of a benchmark's photographs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.exif import NO_GPS, CameraFacts, read_exif
from data_pipeline.positions import Positions, from_lat_lon
from eval.benchmarks.benchmark import Benchmark, Whereabouts, without_labels
from eval.benchmarks.places import by_radius

_TRIED = 32  # photographs of each side, before the EXIF of all is read


def by_camera(
    name: str,
    database: Sequence[Path],
    queries: Sequence[Path],
    radius_m: float,
    notes: Sequence[str] = (),
    *,
    labels: bool = True,
) -> tuple[Benchmark, str]:
    """A benchmark by the GPS in photographs' EXIF, and where its ground truth is from.

    Without recall if a side has no GPS; of a large side an evenly spaced sample decides. Queries without GPS are not
    counted; database images without it are no query's positive, which a note says.
    """
    sides = (database, queries)
    if not labels:
        return without_labels(name, database, queries, notes), "EXIF not read"
    if not all(_some_gps(paths) for paths in sides):
        sampled = f" of {_TRIED} photographs of each" if max(map(len, sides)) > _TRIED else ""
        return without_labels(name, database, queries, notes), f"no GPS in EXIF{sampled}"
    at, told = [], list(notes)
    for paths, what in zip(sides, ("database images", "queries"), strict=True):
        facts = [_facts(path) for path in paths]
        odd = Counter(fact.fault for fact in facts if fact.fault not in ("", NO_GPS))
        told += [f"{count} {what}: {fault}" for fault, count in sorted(odd.items())]
        at.append(_positions(facts, what))
        told += [f"{what}: {note}" for note in at[-1].notes]
    benchmark = by_radius(name, database, queries, Whereabouts(*at), radius_m, told)
    return benchmark, "GPS in EXIF"


def _some_gps(paths: Sequence[Path]) -> bool:
    rows = np.unique(np.linspace(0, len(paths) - 1, min(_TRIED, len(paths))).astype(int))
    return any(_facts(paths[row]).lat is not None for row in rows)


def _facts(path: Path) -> CameraFacts:
    try:
        return read_exif(path)
    except (OSError, ValueError):
        return CameraFacts(fault=NO_GPS)  # what cannot be decoded is named and counted when its pixels are read


def _positions(facts: Sequence[CameraFacts], what: str) -> Positions:
    lat, lon = (np.array([getattr(fact, name) for fact in facts], np.float64) for name in ("lat", "lon"))
    return from_lat_lon(lat, lon, f"EXIF of the {what},", missing_ok=True)
