"""EigenPlaces' places (Berton et al., ICCV 2023): what of a cell looks at one of two focal points.

With the mean mu of the positions in a cell and their principal directions, v1 along the street and v2 across it, the
focal points are mu + D v1 (frontal) and mu + D v2 (lateral). The paper cuts each panorama towards them. Photographs
that are cut already, with a heading each, belong to the focal point that is in their view. Which way v1 and v2 point
is left open by the paper; here it is the way that more photographs look.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDES = ("lateral", "frontal")
NEITHER = -1
_LEAST_SPREAD_M2 = 1e-6  # summed over a cell; below it all positions are one, which gives no direction

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def looked_at(east: Floats, north: Floats, heading: Floats, cell: Ints, *, focal_m: float, view_deg: float) -> Ints:
    """The side that each image looks at [N]: its number in SIDES, or NEITHER.

    East and north are metres, headings degrees clockwise from north, NaN if unknown; `cell` numbers the cells from 0. A
    focal point is in view if its bearing is within `view_deg` / 2 of the heading; of two the one nearer to the middle
    counts. Images of a cell whose positions are all one look at neither. Raises ValueError where no image has a
    heading.
    """
    if np.isnan(heading).all():
        raise ValueError(
            f"--focal-m {focal_m:g} needs headings, and none of {len(heading)} photographs has one; leave it out, and "
            "places are cells"
        )
    at_N2 = np.stack([east - east.mean(), north - north.mean()], axis=1)  # northings are millions: keeps their digits
    count_C = np.maximum(np.bincount(cell), 1)
    mean_C2 = np.stack([np.bincount(cell, at_N2[:, axis]) / count_C for axis in (0, 1)], axis=1)
    away_N2 = at_N2 - mean_C2[cell]
    ee_C, nn_C, en_C = (np.bincount(cell, away_N2[:, a] * away_N2[:, b]) for a, b in ((0, 0), (1, 1), (0, 1)))
    angle_C = np.arctan2(2 * en_C, ee_C - nn_C) / 2  # of v1, from east towards north
    along_C2 = np.stack([np.cos(angle_C), np.sin(angle_C)], axis=1)
    across_C2 = np.stack([-np.sin(angle_C), np.cos(angle_C)], axis=1)
    off_2N = np.stack([_off(away_N2, heading, cell, focal_m * way, view_deg / 2) for way in (across_C2, along_C2)])
    off_2N[:, (ee_C + nn_C < _LEAST_SPREAD_M2)[cell]] = np.inf
    side_N = off_2N.argmin(axis=0)
    return np.where(off_2N.min(axis=0) <= view_deg / 2, side_N, NEITHER)


def _off(away_N2: Floats, heading: Floats, cell: Ints, focal_C2: Floats, most_deg: float) -> Floats:
    """Degrees between each heading and the bearing of its cell's focal point, `focal_C2` from the mean, or opposite it.

    Infinite for images without a heading.
    """
    ways = []
    for sign in (1.0, -1.0):
        to_N2 = sign * focal_C2[cell] - away_N2
        bearing_N = np.degrees(np.arctan2(to_N2[:, 0], to_N2[:, 1]))
        off_N = np.abs((heading - bearing_N + 180.0) % 360.0 - 180.0)
        ways.append(np.where(np.isnan(off_N), np.inf, off_N))
    votes = [np.bincount(cell, off_N <= most_deg) for off_N in ways]
    return np.where((votes[1] > votes[0])[cell], ways[1], ways[0])
