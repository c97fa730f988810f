"""The two ways to compute the loss of a global batch: in tiles here, or by pytorch-metric-learning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from configs.names import nearest
from configs.registry import LOSSES, MINERS, Registry
from configs.schema import LossConfig, MemoryConfig
from memory.decay import half_life, log_weight
from memory.gather import all_gather, all_gather_with_grad
from memory.near_places import NearPlaces
from memory.pairing import GlobalBatch, Memory, Pairing
from memory.probe import probe
from memory.queue import MemoryQueue, Placement
from memory.tiled_loss import TiledLoss


@dataclass(frozen=True)
class Outcome:
    """The loss over all ranks and figures of mining; the same on every rank."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


class Strategy(Protocol):
    """Computes the loss of images against each other and the queue, with its gradient."""

    note: str
    """What a user should know of it; empty for nothing."""

    def gather(self, local_BD: torch.Tensor, placement: Placement) -> torch.Tensor:
        """The descriptors of all ranks [N, D], with the gradient that `loss_of` needs, the queue being so placed."""

    def loss_of(
        self, batch: GlobalBatch, batch_ND: torch.Tensor, queue: MemoryQueue, *, step: int, curve_a2: torch.Tensor
    ) -> Outcome:
        """The loss of a batch, or of a part of one, whose descriptors were gathered."""


def choose_strategy(
    loss: LossConfig, memory: MemoryConfig, gradient_scale: float, near: NearPlaces | None = None
) -> Strategy:
    """Tiles for a loss and miner of LOSSES and MINERS that are made for them, the library for any other.

    `near` is for memory.min_negative_m. Raises ValueError for a name, argument or combination that does not exist.
    """
    if is_for_tiles(LOSSES, loss.name) and is_for_tiles(MINERS, loss.miner):
        return InTiles(loss, memory, gradient_scale, near)
    for own, name, others, other in ((LOSSES, loss.name, MINERS, loss.miner), (MINERS, loss.miner, LOSSES, loss.name)):
        if own.origin(name) and is_for_tiles(own, name):
            raise ValueError(
                f"{own.key} {name} is a plug-in's, for tiles, and {others.key} {other} is none for tiles; "
                f"{nearest(other, others)}"
            )
    return ByLibrary(loss, memory, gradient_scale)


def is_for_tiles(registry: Registry[Any], name: str) -> bool:
    """Whether a name stands for a callable of tiles: a plug-in may also register a class of the library's kind."""
    return name in registry and not (registry.origin(name) and is_of_library(registry[name]))


def is_of_library(thing: Any) -> bool:
    """Whether a class is derived from one of pytorch-metric-learning, which is not imported for this."""
    bases = thing.__mro__ if isinstance(thing, type) else ()
    return any(base.__module__.partition(".")[0] == "pytorch_metric_learning" for base in bases)


class InTiles:
    """Anchors a few rows at a time, each rank its share; memory negatives are weighted by age."""

    note = ""

    def __init__(
        self, loss: LossConfig, memory: MemoryConfig, gradient_scale: float, near: NearPlaces | None = None
    ) -> None:
        self.memory, self.near = memory, near
        built, miner = LOSSES.build(loss.name, loss.args), MINERS.build(loss.miner, loss.miner_args)
        if LOSSES.origin(loss.name) or MINERS.origin(loss.miner):
            probe(built, miner, (loss.name, loss.miner))
        self._half_life: tuple[torch.Tensor, float] | None = None  # of which curve
        self.tiled = TiledLoss(
            built,
            miner,
            tile_bytes=memory.tile_mb << 20,
            gradient_scale=gradient_scale,
            near=near,
        )

    def gather(self, local_BD: torch.Tensor, placement: Placement) -> torch.Tensor:
        """With gradient if other ranks' references or anchors are in this rank's part of the loss."""
        with_grad = self.memory.in_batch == "live" or placement == "sharded"
        return all_gather_with_grad(local_BD) if with_grad else all_gather(local_BD)

    def loss_of(
        self, batch: GlobalBatch, batch_ND: torch.Tensor, queue: MemoryQueue, *, step: int, curve_a2: torch.Tensor
    ) -> Outcome:
        """The loss in tiles. Raises ValueError if memory.min_negative_m is set and nobody said where places are."""
        if self.memory.min_negative_m and self.near is None:
            raise ValueError("memory.min_negative_m needs GlobalLoss(..., near=NearPlaces(...))")
        local_BD, live, sharded = batch.local_BD, self.memory.in_batch == "live", queue.placement == "sharded"
        entries = queue.entries()
        age_m = (step - entries.steps_n).to(local_BD.dtype)
        memory = Memory(
            entries.descriptors_nD.to(local_BD.dtype),
            age_m,
            log_weight(age_m, self.memory, curve_a2),
            entries.place_ids_n,
        )
        pair = Pairing.sharded if sharded else Pairing.replicated
        loss, stats = self.tiled(pair(batch, batch_ND, queue, memory, live=live))
        return Outcome(loss, stats | self._queue_stats(queue, step, curve_a2))

    def _queue_stats(self, queue: MemoryQueue, step: int, curve_a2: torch.Tensor) -> dict[str, torch.Tensor]:
        """Entries held, what they amount to after weighting, and the decay's half-life in steps."""
        age_n = (step - queue.steps()).double()
        weight_n = log_weight(age_n, self.memory, curve_a2.double()).exp()
        stats = {"queue_fill": weight_n.new_full((), len(queue)), "queue_effective_size": weight_n.sum()}
        if self._half_life is None or self._half_life[0] is not curve_a2:  # a measurement makes another curve
            self._half_life = curve_a2, half_life(self.memory, curve_a2)
        half = self._half_life[1]
        return stats | {"decay_half_life": weight_n.new_full((), half)} if math.isfinite(half) else stats


class ByLibrary:
    """The whole batch on every rank; needs the whole queue there, and knows no age."""

    def __init__(self, loss: LossConfig, memory: MemoryConfig, gradient_scale: float) -> None:
        from memory.library_loss import LibraryLoss  # pytorch-metric-learning takes a second to import

        self.live = memory.in_batch == "live"
        self.library = LibraryLoss(loss, gradient_scale=gradient_scale)
        if memory.placement == "sharded":
            raise ValueError(
                f"{loss.name} with {loss.miner} is computed by pytorch-metric-learning, which needs the whole "
                "queue on each rank; set memory.placement replicated"
            )
        if memory.min_negative_m:
            raise ValueError(
                f"memory.min_negative_m works in tiles, and {loss.name} with {loss.miner} is computed by "
                "pytorch-metric-learning; use a loss and miner that docs/memory.md lists, or min_negative_m 0"
            )
        self.note = (
            f"{loss.name} with {loss.miner} is computed by pytorch-metric-learning: every rank computes the whole "
            "batch, and memory negatives have no age weight (memory.decay is ignored)"
        )

    def gather(self, local_BD: torch.Tensor, placement: Placement) -> torch.Tensor:  # noqa: ARG002
        """Without gradient: each rank computes the whole loss and takes its own images' gradient."""
        return all_gather(local_BD)

    def loss_of(
        self,
        batch: GlobalBatch,
        batch_ND: torch.Tensor,
        queue: MemoryQueue,
        *,
        step: int,  # noqa: ARG002
        curve_a2: torch.Tensor,  # noqa: ARG002
    ) -> Outcome:
        """The library's loss."""
        entries = queue.entries()
        memory_MD = entries.descriptors_nD.to(batch.local_BD.dtype)
        loss = self.library(batch, batch_ND, memory_MD, entries.place_ids_n, live=self.live)
        return Outcome(loss, {"queue_fill": loss.new_full((), len(queue))})
