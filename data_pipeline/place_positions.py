"""Where places lie, for rules that ask for metres between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.index import ShardIndex
from data_pipeline.utm import Floats, on_ellipsoid


def place_points(sets: Sequence[ShardIndex]) -> Floats:
    """The mean of each place's positions as a point on WGS84, metres from the Earth's centre [n, 3], over all sets.

    Of its views only those with a position count; a place without any is NaN. Between points of one town the straight
    line is the way along the ground within 1e-6. Raises what `ShardIndex.columns` raises.
    """
    parts = []
    for index in sets:
        table = index.columns(["lat", "lon"])
        lat, lon = (table[name].to_numpy().astype(np.float64) for name in ("lat", "lon"))
        points_N3 = on_ellipsoid(lat, lon)
        known_N = np.isfinite(points_N3).all(axis=1)
        points_N3[~known_N] = 0.0
        starts = index.place_starts[:-1]
        known_P = np.add.reduceat(known_N.astype(np.int64), starts)
        with np.errstate(invalid="ignore"):  # 0 / 0 of a place without a position
            parts.append(np.add.reduceat(points_N3, starts) / known_P[:, None])
    return np.concatenate(parts)


def position_fault(sets: Sequence[ShardIndex], setting: str) -> str:
    """A line naming `setting`, which needs positions, and the first place that has none; empty if all have one."""
    missing = np.flatnonzero(np.isnan(place_points(sets)[:, 0]))
    if not len(missing):
        return ""
    first, number = int(missing[0]), sum(index.num_places for index in sets)
    return (
        f"{setting} needs coordinates, and {len(missing)} of {number} places have none (first: place {first}); set it "
        "to 0, or shard with lat and lon"
    )
