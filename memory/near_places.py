"""Pairs of places that are too near to each other to be negatives."""

from __future__ import annotations

import torch

PER_METRE = 8  # steps of a coordinate
FARTHEST_M = 6.8e6  # from the origin: 3 (8 * 6.8e6)^2 is below 2^53


class NearPlaces:
    """Which places are nearer to each other than `metres`, by place id.

    `points_n3` are the places in space, metres from the Earth's centre; kept as int32 in steps of 1/8 m, 12 bytes per
    place, so that distances are off by less than 0.22 m. In return the product behind d^2 = |a|^2 + |b|^2 - 2 a b adds
    up whole numbers below 2^53, which float64 does without rounding: a pair is near, or is not, bit for bit alike in
    any tile, on any device and over any number of ranks. Raises ValueError for points beyond `FARTHEST_M`.
    """

    def __init__(self, points_n3: torch.Tensor, metres: float) -> None:
        if not bool((points_n3.norm(dim=1) <= FARTHEST_M).all()):
            raise ValueError(f"a place is more than {FARTHEST_M / 1e3:.0f} km from the Earth's centre, or nowhere")
        self.steps_n3 = (points_n3.double() * PER_METRE).round().to(torch.int32)
        self.least = (metres * PER_METRE) ** 2

    def to(self, device: torch.device) -> NearPlaces:
        """The same, kept on a device."""
        self.steps_n3 = self.steps_n3.to(device)
        return self

    def columns(self, place_ids_R: torch.Tensor) -> torch.Tensor:
        """What `rows` takes of references of these places [4, R + 1]; the last column is near to none."""
        points_R3 = self.steps_n3[place_ids_R].double()
        columns_4R = points_R3.new_zeros(4, len(place_ids_R) + 1)
        columns_4R[:3, :-1] = 2 * points_R3.T
        columns_4R[3, :-1] = -points_R3.square().sum(dim=1)
        columns_4R[3, -1] = -(2.0**60)
        return columns_4R

    def rows(self, place_ids_A: torch.Tensor, columns_4R: torch.Tensor, buffer_AR: torch.Tensor) -> torch.Tensor:
        """Whether anchors of these places are near to references: bool [A, R + 1]; `buffer_AR`, float64, is used up."""
        points_A3 = self.steps_n3[place_ids_A].double()
        points_A4 = torch.cat([points_A3, torch.ones_like(points_A3[:, :1])], dim=1)
        torch.mm(points_A4, columns_4R, out=buffer_AR)  # 2 a b - |b|^2
        return buffer_AR > points_A3.square().sum(dim=1, keepdim=True) - self.least
