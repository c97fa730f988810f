"""Where a photograph was taken, from where its candidates were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.positions import MAP, Positions, metres_between
from data_pipeline.utm import degrees_from_utm

NEAR_M = 50.0  # candidates so near each other show one place


@dataclass(frozen=True)
class Estimate:
    """A position and how far it can be believed.

    `lat` and `lon` in degrees, NaN where the index holds metres of a map without a zone; `east`, `north` in metres of
    `zone` (UTM's 1 to 60; 0 is such a map). `spread_m` is the weighted root mean square distance of the candidates that
    were averaged, `support` the share of all candidates' weight that is theirs, `candidates` their number.
    """

    lat: float
    lon: float
    east: float
    north: float
    zone: int
    spread_m: float
    support: float
    candidates: int


def taken(positions: Positions, numbers: NDArray[np.int64]) -> Positions:
    """The positions of some images."""
    return Positions(
        positions.east[numbers],
        positions.north[numbers],
        positions.zone[numbers],
        positions.lat[numbers],
        positions.lon[numbers],
        positions.in_metres,
    )


def distances(positions: Positions) -> NDArray[np.float64]:
    """Metres [T, T] between candidates; NaN where one is unknown, infinite between maps."""
    count = len(positions)
    rows, columns = np.divmod(np.arange(count * count), max(count, 1))
    return metres_between(taken(positions, rows), taken(positions, columns)).reshape(count, count)


def estimate(positions: Positions, weight_T: NDArray[np.float64], near_m: float = NEAR_M) -> Estimate | None:
    """The weighted mean of the candidates around the one that has most weight within `near_m`; None without positions.

    A mean over all candidates would lie between two places that look alike; this one lies at one of them, and `support`
    says how much spoke for it.
    """
    known = np.flatnonzero(positions.known)
    if not len(known):
        return None
    positions, weight_T = taken(positions, known), np.maximum(weight_T[known], 0.0)
    if not weight_T.sum() > 0:
        weight_T = np.ones(len(known))
    apart_TT = distances(positions)
    near_TT = apart_TT <= near_m
    centre = int(np.argmax(near_TT @ weight_T))
    near = np.flatnonzero(near_TT[centre] & (positions.zone == positions.zone[centre]))
    weight = weight_T[near] / weight_T[near].sum()
    east, north = float(weight @ positions.east[near]), float(weight @ positions.north[near])
    apart = np.hypot(positions.east[near] - east, positions.north[near] - north)
    zone = int(positions.zone[centre])
    lat = lon = float("nan")
    if zone > MAP:
        lats, lons = degrees_from_utm(np.array([east]), np.array([north]), np.array([zone]))
        lat, lon = float(lats[0]), float(lons[0])
    return Estimate(
        lat=lat,
        lon=lon,
        east=east,
        north=north,
        zone=zone,
        spread_m=float(np.sqrt(weight @ apart**2)),
        support=float(weight_T[near].sum() / weight_T.sum()),
        candidates=len(near),
    )
