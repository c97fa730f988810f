"""One loss over all ranks: the global batch against itself and the memory queue.

No pair list and no [B, M] matrix is ever held: anchors are taken in tiles of as many rows as `memory.tile_mb` allows,
and a tile's share of the gradient is formed as soon as its similarities are known, so that a step costs two matrix
products with the references, one for the similarities and one for the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from configs.schema import LossConfig, MemoryConfig
from memory.decay import half_life, log_weight
from memory.gather import all_gather, all_gather_with_grad, check_equal_batches
from memory.losses import LOSSES
from memory.miners import MINERS
from memory.queue import MemoryQueue
from memory.registry import build
from memory.tiled_loss import Memory, Pairing, TiledLoss
from memory.tiles import Columns


@dataclass(frozen=True)
class GlobalLossOutput:
    """A step's loss and what the queue stores of it."""

    loss: torch.Tensor  # of the global batch, the same on every rank; backward() is for all ranks together
    descriptors_ND: torch.Tensor  # the global batch, detached
    place_ids_N: torch.Tensor
    stats: dict[str, torch.Tensor]  # over the global batch, the same on every rank


class GlobalLoss:
    """The recipe's loss over all ranks; its parameter gradient is that of one process that holds the whole batch.

    The engine behind it may average gradients over ranks (`engine_reduces` "mean", as DeepSpeed and DDP do) or add them
    up ("sum"). A loss and miner of LOSSES and MINERS are computed in tiles; any other of pytorch-metric-learning that
    takes a reference set is computed by the library, and `note` says what that means. Raises ValueError for a name,
    argument or combination that does not exist.
    """

    def __init__(
        self, loss: LossConfig, memory: MemoryConfig, *, engine_reduces: Literal["mean", "sum"] = "mean"
    ) -> None:
        self.memory, self.note = memory, ""
        scale = float(dist.get_world_size()) if engine_reduces == "mean" else 1.0
        self.tiled: TiledLoss | None = None
        if loss.name not in LOSSES or loss.miner not in MINERS:
            from memory.library_loss import LibraryLoss

            self.library = LibraryLoss(loss.name, loss.args, loss.miner, loss.miner_args, gradient_scale=scale)
            if memory.placement == "sharded":
                raise ValueError(
                    f"{loss.name} with {loss.miner} is computed by pytorch-metric-learning, which needs the whole "
                    "queue on each rank; set memory.placement replicated"
                )
            self.note = (
                f"{loss.name} with {loss.miner} is computed by pytorch-metric-learning: every rank computes the whole "
                "batch, and memory negatives have no age weight (memory.decay is ignored)"
            )
        else:
            self.tiled = TiledLoss(
                build("loss.name", loss.name, loss.args, LOSSES),
                build("loss.miner", loss.miner, loss.miner_args, MINERS),
                tile_bytes=memory.tile_mb << 20,
                gradient_scale=scale,
            )

    def __call__(
        self,
        local_BD: torch.Tensor,
        place_ids_B: torch.Tensor,
        queue: MemoryQueue,
        *,
        step: int,
        drift_curve_a2: torch.Tensor | None = None,
    ) -> GlobalLossOutput:
        """The loss of the global batch; `local_BD` are this rank's L2-normalised descriptors, as many on every rank.

        Computed in float32, or float64 if given so. With in_batch "live" both sides of a pair inside the batch carry
        gradient, across ranks too; with "detached" only the anchor's. Memory entries carry none, and their negatives
        are weighted by age in optimizer steps; `drift_curve_a2` (age, cosine) is what decay "measured" weighs by. A
        descriptor that is not finite, on any rank, makes the loss NaN on all. Raises ValueError, on every rank, if
        ranks hold unequal batches.
        """
        check_equal_batches(local_BD, place_ids_B)
        local_BD = local_BD.to(torch.promote_types(local_BD.dtype, torch.float32))
        curve_a2 = drift_curve_a2 if drift_curve_a2 is not None else local_BD.new_zeros(0, 2)
        batch_ids_N = all_gather(place_ids_B)
        if self.tiled:
            batch_ND, loss, stats = self._tiled_loss(
                self.tiled, local_BD, place_ids_B, batch_ids_N, queue, step, curve_a2
            )
            stats |= self._queue_stats(queue, step, curve_a2)
        else:
            batch_ND = all_gather(local_BD)
            entries = queue.entries()
            loss = self.library(
                local_BD,
                batch_ND,
                batch_ids_N,
                entries.descriptors_nD.to(local_BD.dtype),
                entries.place_ids_n,
                live=self.memory.in_batch == "live",
            )
            stats = {"queue_fill": loss.new_tensor(float(len(queue)))}
        return GlobalLossOutput(loss, batch_ND.detach(), batch_ids_N, stats)

    def _tiled_loss(
        self,
        tiled: TiledLoss,
        local_BD: torch.Tensor,
        place_ids_B: torch.Tensor,
        batch_ids_N: torch.Tensor,
        queue: MemoryQueue,
        step: int,
        curve_a2: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The gathered batch, the loss and its figures."""
        live, sharded = self.memory.in_batch == "live", queue.placement == "sharded"
        start, held = dist.get_rank() * len(local_BD), len(queue)
        entries = queue.entries()
        age_m = (step - entries.steps_n).to(local_BD.dtype)
        memory = Memory(entries.descriptors_nD.to(local_BD.dtype), age_m, log_weight(age_m, self.memory, curve_a2))
        batch_ND = all_gather_with_grad(local_BD) if live or sharded else all_gather(local_BD)
        reference_ids_G = torch.cat([batch_ids_N, queue.place_ids_M[:held]])
        if sharded:  # the anchors of all ranks against this rank's references
            anchors_AD, anchor_ids_A, anchor_start = batch_ND, batch_ids_N, 0
            batch_CD, batch_start = local_BD, start
            column_G = torch.full_like(reference_ids_G, -1)
            column_G[start : start + len(local_BD)] = torch.arange(len(local_BD), device=column_G.device)
            own = torch.arange(held, device=column_G.device)[queue.rank :: queue.num_shards]
            column_G[len(batch_ids_N) + own] = len(local_BD) + own // queue.num_shards
        else:  # this rank's anchors against all references
            anchors_AD, anchor_ids_A, anchor_start = local_BD, place_ids_B, start
            batch_CD, batch_start = batch_ND, 0
            column_G = torch.arange(len(reference_ids_G), device=reference_ids_G.device)
        pairing = Pairing(
            anchor_ids_A=anchor_ids_A,
            anchor_start=anchor_start,
            reference_ids_G=reference_ids_G,
            column_G=column_G,
            batch_start=batch_start,
            batch_size=len(batch_ids_N),
            memory=memory,
            widest=len(batch_CD) + math.ceil(held / queue.num_shards),
            columns=Columns(sharded),
            live=live,
        )
        loss, stats = tiled(anchors_AD, batch_CD if live else batch_CD.detach(), pairing)
        return batch_ND, loss, stats

    def _queue_stats(self, queue: MemoryQueue, step: int, curve_a2: torch.Tensor) -> dict[str, torch.Tensor]:
        """Entries held, what they amount to after weighting, and the decay's half-life in steps."""
        age_n = (step - queue.steps()).double()
        weight_n = log_weight(age_n, self.memory, curve_a2.double()).exp()
        stats = {"queue_fill": weight_n.new_tensor(float(len(queue))), "queue_effective_size": weight_n.sum()}
        half = half_life(self.memory, curve_a2)
        return stats | {"decay_half_life": weight_n.new_tensor(half)} if math.isfinite(half) else stats
