"""Where places lie, for rules that ask for metres between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.secrets import without_secrets
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


def position_fault(sets: Sequence[ShardIndex], setting: str, points_n3: Floats | None = None) -> str:
    """A line naming `setting`, which needs positions, and the first place that has none; empty if all have one.

    `points_n3` are the sets' `place_points`, if they are known.
    """
    points_n3 = place_points(sets) if points_n3 is None else points_n3
    missing = np.flatnonzero(np.isnan(points_n3[:, 0]))
    if not len(missing):
        return ""
    first_place = np.cumsum([0, *(index.num_places for index in sets)])
    number = int(np.searchsorted(first_place, missing[0], side="right")) - 1
    where = without_secrets(sets[number].location, is_address=True)
    return (
        f"{setting} needs coordinates, and {len(missing)} of {len(points_n3)} places have none (first: place "
        f"{missing[0] - first_place[number]} of {where}); set it to 0, or shard with lat and lon"
    )


def points_for(sets: Sequence[ShardIndex], setting: str, metres: float) -> Floats:
    """`place_points` for a setting that tells places apart by `metres`.

    Raises ValueError if a place has no position, and if all places are so near that all would count as one.
    """
    points_n3 = place_points(sets)
    if fault := position_fault(sets, setting, points_n3):
        raise ValueError(fault)
    diagonal = float(np.linalg.norm(np.ptp(points_n3, axis=0)))
    if diagonal < metres:
        raise ValueError(
            f"{setting} {metres:g}: all {len(points_n3)} places are within {diagonal:.0f} m of each other, so that no "
            "pair of them would be left; use a smaller distance"
        )
    return points_n3


def share_with_neighbours(points_n3: Floats, metres: float) -> float:
    """Share of the places that have another one nearer than `metres`."""
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]  # takes a while to import

    if len(points_n3) < 2:
        return 0.0
    nearest_n2, _ = cKDTree(points_n3).query(points_n3, k=2)
    return float((nearest_n2[:, 1] < metres).mean())
