"""One loss over all ranks: the global batch against itself and the memory queue.

What it computes, written densely for the Multi-Similarity loss (N images of the batch, M entries of the queue):

    references_RD = cat([batch_ND, queue_MD])                           R = N + M
    s_NR          = batch_ND @ references_RD.T                          cosines
    positive_NR   = same place, but no image with itself                and what the miner keeps
    negative_NR   = another place, at least min_negative_m away         and what the miner keeps
    w_R           = cat([ones(N), exp(-decay_lambda * age_M)])          age in optimizer steps
    L_N           = log(1 + sum_R positive_NR * exp(-alpha * (s_NR - base))) / alpha
                  + log(1 + sum_R negative_NR * w_R * exp(beta * (s_NR - base))) / beta
    loss          = mean(L_N)

What tiles change is the memory that this takes, and no number: anchors are taken a few rows at a time, as many as
`memory.tile_mb` allows, and a tile's share of the gradient is formed as soon as its similarities are known. No matrix
[N, R] and no list of pairs is ever held; a step costs two matrix products with the references, one for the
similarities and one for the gradient. What ranks change: each takes its own anchors (or, with a sharded queue, its own
references), and what adds up over references or anchors is added up over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from configs.host_copies import to_device
from configs.schema import LossConfig, MemoryConfig
from memory.gather import all_gather, check_equal_batches, check_one_id_each
from memory.near_places import NearPlaces
from memory.pairing import GlobalBatch
from memory.per_set import loss_per_set
from memory.place_sets import PlaceSets
from memory.queue import MemoryQueue
from memory.set_queues import SetQueues
from memory.strategies import choose_strategy


@dataclass(frozen=True)
class GlobalLossOutput:
    """A step's loss and what the queue stores of it."""

    loss: torch.Tensor  # of the global batch, the same on every rank; backward() is for all ranks together
    descriptors_ND: torch.Tensor  # the global batch, detached
    place_ids_N: torch.Tensor
    stats: dict[str, torch.Tensor]  # over the global batch, the same on every rank
    host_ids_N: torch.Tensor | None = None  # the place ids on the host, if the caller gave them


class GlobalLoss:
    """The recipe's loss over all ranks; its parameter gradient is that of one process that holds the whole batch.

    The engine behind it may average gradients over ranks (`engine_reduces` "mean", as DeepSpeed and DDP do) or add them
    up ("sum"). A loss and miner of configs/registry.py are computed in tiles; any other of pytorch-metric-learning that
    takes a reference set is computed by the library, and `note` says what that means. `near` is for
    memory.min_negative_m: where the places are. With `sets` the loss is the weighted sum of one for each set's images.
    Raises ValueError for a name, argument or combination that does not exist.
    """

    def __init__(
        self,
        loss: LossConfig,
        memory: MemoryConfig,
        *,
        engine_reduces: Literal["mean", "sum"] = "mean",
        near: NearPlaces | None = None,
        sets: PlaceSets | None = None,
    ) -> None:
        scale = float(dist.get_world_size()) if engine_reduces == "mean" else 1.0
        self.strategy = choose_strategy(loss, memory, scale, near)
        self.sets, self.note = sets, self.strategy.note
        self._checked_size = 0  # N for which ranks have compared their batches

    def __call__(
        self,
        local_BD: torch.Tensor,
        place_ids_B: torch.Tensor,
        queue: MemoryQueue | SetQueues,
        *,
        step: int,
        drift_curve_a2: torch.Tensor | None = None,
        place_ids_N: torch.Tensor | None = None,
    ) -> GlobalLossOutput:
        """The loss of the global batch; `local_BD` are this rank's L2-normalised descriptors, as many on every rank.

        Computed in float32, or float64 if given so. With in_batch "live" both sides of a pair inside the batch carry
        gradient, across ranks too; with "detached" only the anchor's. Memory entries carry none, and their negatives
        are weighted by age in optimizer steps; `drift_curve_a2` (age, cosine) is what decay "measured" weighs by. A
        descriptor that is not finite, on any rank, makes the loss NaN on all.

        `place_ids_N` are the places of the whole batch in the order of ranks, on the host, for a caller who knows them
        (a plan does): then no rank asks another, nor the host the device. Raises ValueError, on every rank, if ranks
        hold unequal batches; with `place_ids_N` they compare at the first step and when N changes, and a rank whose
        own batch does not fit raises alone.
        """
        ids_B, ids_N = self._place_ids(local_BD, place_ids_B, place_ids_N)
        local_BD = local_BD.to(torch.promote_types(local_BD.dtype, torch.float32))
        batch = GlobalBatch(local_BD, ids_B, ids_N, place_ids_N)
        curve_a2 = drift_curve_a2 if drift_curve_a2 is not None else local_BD.new_zeros(0, 2)
        batch_ND = self.strategy.gather(local_BD, queue.placement)
        if self.sets:
            found = loss_per_set(self.strategy, self.sets, batch, batch_ND, queue, step=step, curve_a2=curve_a2)
        else:
            assert isinstance(queue, MemoryQueue)
            found = self.strategy.loss_of(batch, batch_ND, queue, step=step, curve_a2=curve_a2)
        return GlobalLossOutput(found.loss, batch_ND.detach(), batch.ids_N, found.stats, place_ids_N)

    def _place_ids(
        self, local_BD: torch.Tensor, place_ids_B: torch.Tensor, place_ids_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of this rank's images and of all, beside the descriptors; checked."""
        device = local_BD.device
        if place_ids_N is None:
            place_ids_B = place_ids_B.to(device)
            check_equal_batches(local_BD, place_ids_B)
            return place_ids_B, all_gather(place_ids_B)
        if self._checked_size != len(place_ids_N):  # N is known to all ranks alike, so that all compare or none
            check_equal_batches(local_BD, place_ids_B)
            self._checked_size = len(place_ids_N)
        check_one_id_each(local_BD, place_ids_B)
        size = len(local_BD)
        own = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        if len(place_ids_N) != dist.get_world_size() * size or not torch.equal(place_ids_N[own], place_ids_B.cpu()):
            raise ValueError(
                f"rank {dist.get_rank()}: its {size} place ids are not rows {own.start} to {own.stop} of the "
                f"{len(place_ids_N)} of the global batch"
            )
        ids_N = to_device(place_ids_N, device)
        return ids_N[own], ids_N
