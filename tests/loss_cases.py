"""Short trainings whose every step is compared with one process: settings, inputs, what an anchor meets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.schema import LossConfig
from tests.dense_loss import Batch

IN, OUT = 11, 7
MS = {"alpha": 2, "beta": 50, "base": 0.5}
Stored = list[tuple[torch.Tensor, int, int]]  # descriptor, place and step of what was enqueued, the oldest first


@dataclass(frozen=True)
class LossCase:
    """A loss, and which pairs it counts."""

    loss: str = "MultiSimilarityLoss"
    miner: str = "MultiSimilarityMiner"
    placement: str = "replicated"
    in_batch: str = "live"
    min_negative_m: float = 0

    def config(self) -> LossConfig:
        return LossConfig(name=self.loss, miner=self.miner, args=MS if self.loss == "MultiSimilarityLoss" else {})

    def batch(
        self,
        descriptors_ND: torch.Tensor,
        ids_N: torch.Tensor,
        held: Stored,
        ages: Sequence[float],
        points: torch.Tensor,
    ) -> Batch:
        """Anchors against themselves and `held`, whose weights are exp(-age); `points` [places, 3] are in metres."""
        live = self.in_batch == "live"
        memory = torch.stack([row for row, _, _ in held]).double() if held else descriptors_ND[:0].detach()
        ids_R = torch.cat([ids_N, torch.tensor([place for _, place, _ in held], dtype=torch.int64)])
        near_NR = (points[ids_N][:, None] - points[ids_R]).norm(dim=2) < self.min_negative_m
        return Batch(
            descriptors_ND,
            ids_N,
            torch.cat([descriptors_ND if live else descriptors_ND.detach(), memory]),
            ids_R,
            torch.exp(-torch.tensor([0.0] * len(ids_N) + list(ages), dtype=torch.float64)),
            live,
            near_NR if self.min_negative_m else None,
        )


def draw_images(centres: torch.Tensor, places_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [N, IN] of places, those of one place alike."""
    return centres[places_N] + 0.7 * torch.randn(len(places_N), IN, generator=generator, dtype=torch.float64)


def first_weight(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The linear map [IN, OUT] that trainings begin with."""
    return torch.randn(IN, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def from_rank_0(found: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What rank 0 has found, on every rank: one process computes what all are held to."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=torch.float64)
    if dist.get_rank() == 0:
        torch.cat([one.detach().flatten() for one in found], out=flat)
    dist.broadcast(flat, 0)
    return [part.view(tuple(shape)) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
