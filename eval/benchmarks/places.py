"""Ground truth from where the images are: positives within a radius, for the images whose position is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.positions import Positions, from_utm_names, metres_between, within_radius
from eval.benchmarks.benchmark import Benchmark, Whereabouts, make_benchmark, without_labels

_COLUMNS = ("east", "north", "zone", "lat", "lon")


def of_utm_names(database: Sequence[Path], queries: Sequence[Path]) -> tuple[Whereabouts, list[str]]:
    """Where images named in the field's UTM convention are, and what looks odd about it.

    Zones of both are checked together: a name without one is of the others' zone. Raises ValueError naming the file.
    """
    both = from_utm_names([*database, *queries])
    parts = (taken(both, np.arange(len(both)) < len(database)), taken(both, np.arange(len(both)) >= len(database)))
    return Whereabouts(*parts), list(both.notes)


def by_radius(
    name: str,
    database: Sequence[Path],
    queries: Sequence[Path],
    at: Whereabouts,
    radius_m: float,
    notes: Sequence[str] = (),
) -> Benchmark:
    """A benchmark whose positives lie within `radius_m` metres; a query without one counts as a miss.

    Queries whose position is unknown have no ground truth; database images without one can be nobody's positive, which
    a note says.
    """
    notes = list(notes)
    lost = int((~at.database.known).sum())
    if lost == len(database) or not at.queries.known.any():
        return replace(without_labels(name, database, queries, notes), at=at)
    if lost:
        first = database[int(np.argmin(at.database.known))].name
        notes.append(f"{lost} of {len(database)} database images have no position and are no query's place ({first})")
    positives = within_radius(at.queries, at.database, radius_m)
    counted = "all queries" if at.queries.known.all() else f"{int(at.queries.known.sum())} of {len(queries)} queries"
    protocol = f"{radius_m:g} m radius, {counted}"
    return make_benchmark(name, protocol, database, queries, positives, notes, labelled_Q=at.queries.known, at=at)


def metres_to(at: Whereabouts, queries: NDArray[np.int64], database: NDArray[np.int64]) -> NDArray[np.float64]:
    """Metres from queries to database images, element by element; NaN where either is unknown, or on another map."""
    metres = metres_between(taken(at.queries, queries), taken(at.database, database))
    return np.where(np.isfinite(metres), metres, np.nan)


def joined(parts: Sequence[Positions]) -> Positions:
    """Positions one after another."""
    columns: dict[str, Any] = {key: np.concatenate([getattr(part, key) for part in parts]) for key in _COLUMNS}
    return replace(parts[0], **columns, notes=tuple(note for part in parts for note in part.notes))


def taken(positions: Positions, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Positions:
    """The positions of some rows, without notes, which are of them all."""
    columns: dict[str, Any] = {key: getattr(positions, key)[rows] for key in _COLUMNS}
    return replace(positions, **columns, notes=())


def spread(positions: Positions, at: NDArray[np.bool_]) -> Positions:
    """The positions in the rows of `at` that are true, unknown in the others."""
    columns: dict[str, Any] = {}
    for key in _COLUMNS:
        values = getattr(positions, key)
        columns[key] = np.full(len(at), np.nan if values.dtype.kind == "f" else 0, dtype=values.dtype)
        columns[key][at] = values
    return replace(positions, **columns)
