"""Places out of coordinates: images of one square cell that look one way are of one place (CosPlace, 2022)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.positions import MAP, Positions
from data_pipeline.sources.viewpoints import NEITHER, SIDES, looked_at
from data_pipeline.utm import utm_from_degrees

_FROM_MERIDIAN = 9.0  # degrees of longitude: a zone's own 3 and its neighbours'; metres are then 0.5 % too long at most
SUGGESTED_M = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0)
_ENOUGH = 0.85


@dataclass(frozen=True)
class Grid:
    """Cells of `cell_m` metres and sectors of `heading_deg` degrees, dealt out to groups whose places do not touch.

    With `groups` n, two places of a group are n - 1 cells apart or look another way, and every other sector is of
    another group: CosPlace's own are 10 m, 30 degrees and 5. With 1 all places are of one group.

    With `focal_m` above 0 places are EigenPlaces': what of a cell looks at a focal point as far away, within half of
    `heading_deg`; lateral and frontal places are of different groups. Its own are 15 m, 3 and 10 m.
    """

    cell_m: float = 10.0
    heading_deg: float = 30.0
    groups: int = 5
    focal_m: float = 0.0

    def __post_init__(self) -> None:
        if self.cell_m <= 0 or not 0 < self.heading_deg <= 360 or self.groups < 1:
            raise ValueError(
                f"a grid of cells of {self.cell_m} m, sectors of {self.heading_deg} degrees and {self.groups} groups; "
                "expected more than 0 m, more than 0 to 360 degrees, 1 group or more"
            )
        if self.focal_m < 0:
            raise ValueError(f"focal points {self.focal_m:g} m away; expected 0, which is off, or more")


def place_of_images(
    east: NDArray[np.float64], north: NDArray[np.float64], heading: NDArray[np.float64], grid: Grid
) -> tuple[list[str], NDArray[np.int64]]:
    """Each image's group, as a suffix for its city's name ("" if there is but one group), and its place's number there.

    `east` and `north` are metres [n], `heading` degrees [n]; images without one (NaN) make a sector of their own.
    Numbers are dense from 0, by cell from west to east, then south to north, then sector. With focal points the last
    part of a suffix is the side, one of SIDES, and images that look at neither have place NEITHER.
    """
    cell_e = np.floor(east / grid.cell_m).astype(np.int64)
    cell_n = np.floor(north / grid.cell_m).astype(np.int64)
    if not grid.focal_m:
        known = np.nan_to_num(heading, nan=0.0) % 360.0
        sector = np.where(np.isnan(heading), -1, np.floor(known / grid.heading_deg)).astype(np.int64)
        return _numbered(np.stack([cell_e, cell_n, sector], axis=1), grid)
    _, cell = np.unique(np.stack([cell_e, cell_n], axis=1), axis=0, return_inverse=True)
    side = looked_at(east, north, heading, cell.reshape(-1), focal_m=grid.focal_m, view_deg=grid.heading_deg)
    suffixes, place = np.full(len(side), "", dtype=object), np.full(len(side), NEITHER)
    at = np.flatnonzero(side != NEITHER)
    suffixes[at], place[at] = _numbered(np.stack([cell_e, cell_n, side], axis=1)[at], grid)
    return suffixes.tolist(), place


def _numbered(spots: NDArray[np.int64], grid: Grid) -> tuple[list[str], NDArray[np.int64]]:
    """The group of each image, as a suffix, and the number of its place in the group; a spot is cell and sector [n, 3].

    With focal points it is cell and side.
    """
    places, place = np.unique(spots, axis=0, return_inverse=True)
    place = place.reshape(-1)
    if grid.groups == 1 and not grid.focal_m:
        return [""] * len(spots), place
    group = np.stack([places[:, 0] % grid.groups, places[:, 1] % grid.groups, places[:, 2] % 2], axis=1)
    suffix = [_suffix(row, grid) for row in group.tolist()]
    number = np.zeros(len(places), dtype=np.int64)
    _, group_of = np.unique(group, axis=0, return_inverse=True)
    group_of = group_of.reshape(-1)
    order = np.argsort(group_of, kind="stable")
    first = np.flatnonzero(np.diff(group_of[order], prepend=-1))
    number[order] = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    return [suffix[p] for p in place.tolist()], number[place]


def _suffix(group: list[int], grid: Grid) -> str:
    turn = SIDES[group[2]] if grid.focal_m else group[2]
    return "-".join(["", *map(str, group[:2] if grid.groups > 1 else ()), str(turn)])


def plane(positions: Positions) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Metres east and north [N] in which cells are cut, and each position's suffix for its city's name.

    Positions of one zone keep their metres. Those of several are measured in the commonest of them, so that a town on a
    border stays whole; if that is too far away for some, every zone has metres of its own and a suffix, as in `-32`.
    """
    zones, counts = np.unique(positions.zone[positions.known], return_counts=True)
    if len(zones) <= 1:
        return positions.east, positions.north, [""] * len(positions)
    if (zones > MAP).all():
        common = np.full(len(positions), zones[counts.argmax()])
        away = (positions.lon - (common * 6.0 - 183.0) + 180.0) % 360.0 - 180.0
        if np.nanmax(np.abs(away)) <= _FROM_MERIDIAN:
            east, north = utm_from_degrees(positions.lat, positions.lon, common)
            kept = positions.zone == common
            return np.where(kept, positions.east, east), np.where(kept, positions.north, north), [""] * len(positions)
    return positions.east, positions.north, [f"-{zone}" for zone in positions.zone.tolist()]


@dataclass(frozen=True)
class CellSize:
    """What cells of one size would give: places with enough images, the images in them, and their median per place."""

    cell_m: float
    places: int
    images: int
    images_per_place: float


def cell_sizes(
    east: NDArray[np.float64], north: NDArray[np.float64], heading: NDArray[np.float64], grid: Grid, least: int
) -> list[CellSize]:
    """For the usual sizes of cells and the grid's own: the places that would have at least `least` images."""
    sizes = []
    for cell_m in sorted({*SUGGESTED_M, grid.cell_m}):
        suffix, place = place_of_images(east, north, heading, replace(grid, cell_m=cell_m, groups=1))
        _, group = np.unique(suffix, return_inverse=True)
        known = place != NEITHER
        _, counts = np.unique(np.stack([group.reshape(-1)[known], place[known]]), axis=1, return_counts=True)
        counts = counts[counts >= least]
        sizes.append(CellSize(cell_m, len(counts), int(counts.sum()), float(np.median(counts)) if len(counts) else 0.0))
    return sizes


def suggested(sizes: list[CellSize]) -> float | None:
    """The smallest size whose places, 2 or more, use 85 % of the images that the best size uses; None if none has two.

    Larger cells use a few more images, and call more of what looks different one place.
    """
    useful = [size for size in sizes if size.places >= 2 and size.cell_m <= SUGGESTED_M[-1]]
    most = max((size.images for size in useful), default=0)
    return next((size.cell_m for size in useful if size.images >= _ENOUGH * most), None)


def neighbour_distances(east: NDArray[np.float64], north: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres from each image to the nearest other one [N]; none for fewer than two."""
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]

    if len(east) < 2:
        return np.zeros(0)
    points = np.stack([east, north], axis=1)
    points -= points.mean(axis=0)
    distances: NDArray[np.float64] = cKDTree(points).query(points, k=2)[0][:, 1]
    return distances
