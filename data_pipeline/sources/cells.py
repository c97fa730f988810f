"""Places out of coordinates: images of one square cell that look one way are of one place (CosPlace, 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """Cells of `cell_m` metres and sectors of `heading_deg` degrees, dealt out to groups whose places do not touch.

    With `groups` n, two places of a group are n - 1 cells apart or look another way, and every other sector is of
    another group: CosPlace's own are 10 m, 30 degrees and 5. With 1 all places are of one group.
    """

    cell_m: float = 10.0
    heading_deg: float = 30.0
    groups: int = 5

    def __post_init__(self) -> None:
        if self.cell_m <= 0 or not 0 < self.heading_deg <= 360 or self.groups < 1:
            raise ValueError(
                f"a grid of cells of {self.cell_m} m, sectors of {self.heading_deg} degrees and {self.groups} groups; "
                "expected more than 0 m, more than 0 to 360 degrees, 1 group or more"
            )


def place_of_images(
    east: NDArray[np.float64], north: NDArray[np.float64], heading: NDArray[np.float64], grid: Grid
) -> tuple[list[str], NDArray[np.int64]]:
    """Each image's group, as a suffix for its city's name ("" if there is but one group), and its place's number there.

    `east` and `north` are metres [n], `heading` degrees [n]; images without one (NaN) make a sector of their own.
    Numbers are dense from 0, by cell from west to east, then south to north, then sector.
    """
    cell_e = np.floor(east / grid.cell_m).astype(np.int64)
    cell_n = np.floor(north / grid.cell_m).astype(np.int64)
    known = np.nan_to_num(heading, nan=0.0) % 360.0
    sector = np.where(np.isnan(heading), -1, np.floor(known / grid.heading_deg)).astype(np.int64)
    places, place = np.unique(np.stack([cell_e, cell_n, sector], axis=1), axis=0, return_inverse=True)
    place = place.reshape(-1)
    if grid.groups == 1:
        return [""] * len(east), place
    group = np.stack([places[:, 0] % grid.groups, places[:, 1] % grid.groups, places[:, 2] % 2], axis=1)
    suffix = ["-".join(["", *map(str, row)]) for row in group.tolist()]
    number = np.zeros(len(places), dtype=np.int64)
    _, group_of = np.unique(group, axis=0, return_inverse=True)
    group_of = group_of.reshape(-1)
    order = np.argsort(group_of, kind="stable")
    first = np.flatnonzero(np.diff(group_of[order], prepend=-1))
    number[order] = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    return [suffix[p] for p in place.tolist()], number[place]
