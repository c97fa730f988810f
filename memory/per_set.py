"""A loss for each data set's part of the batch, added up: MegaLoc's sub-batches (Berton and Masone, 2025)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from memory.pairing import GlobalBatch
from memory.place_sets import PlaceSets, Rows
from memory.queue import MemoryQueue
from memory.set_queues import SetQueues
from memory.strategies import Outcome, Strategy

PER_ANCHOR = ("mined_positives", "mined_negatives", "trivial_anchors", "near_negatives")
ADD_UP = ("queue_fill", "queue_effective_size")


def loss_per_set(
    strategy: Strategy,
    sets: PlaceSets,
    batch: GlobalBatch,
    batch_ND: torch.Tensor,
    queue: MemoryQueue | SetQueues,
    *,
    step: int,
    curve_a2: torch.Tensor,
) -> Outcome:
    """The sum of weight times loss over sets; the loss of a set is of its images alone, against each other and a queue.

    That is the set's own queue of `SetQueues`, or the whole `MemoryQueue`. Figures are by set, `<set>/<figure>`, and
    over all if that has a meaning. Raises ValueError, on every rank, unless each rank has equally many images
    of a set, one or more.
    """
    host_ids_N = batch.host_ids_N if batch.host_ids_N is not None else batch.ids_N.cpu()
    total = batch.local_BD.new_zeros(())
    figures: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for number, (name, rows) in enumerate(zip(sets.names, sets.rows(host_ids_N, batch_ND.device), strict=True)):
        part = _part(batch, host_ids_N, rows, name)
        own = queue.of_set(number) if isinstance(queue, SetQueues) else queue
        found = strategy.loss_of(part, batch_ND[rows.device_n], own, step=step, curve_a2=curve_a2)
        total = total + sets.weights[number] * found.loss
        of_set = {"loss": found.loss.detach()} | found.stats
        figures |= {f"{name}/{figure}": value for figure, value in of_set.items()}
        for figure, value in found.stats.items():
            if figure in PER_ANCHOR:
                whole[figure] = whole.get(figure, 0) + value * (len(rows.host_n) / len(host_ids_N))
            elif figure in ADD_UP and isinstance(queue, SetQueues):
                whole[figure] = whole.get(figure, 0) + value
            elif figure in ADD_UP or figure == "decay_half_life":
                whole[figure] = value
    return Outcome(total, whole | figures)


def _part(batch: GlobalBatch, host_ids_N: torch.Tensor, rows: Rows, name: str) -> GlobalBatch:
    """A set's images of a batch, as a batch."""
    size, world_size = len(batch.local_BD), dist.get_world_size()
    by_rank_W = torch.bincount(rows.host_n // size, minlength=world_size)
    if by_rank_W.min() == 0 or by_rank_W.min() != by_rank_W.max():
        raise ValueError(
            f"data set {name}: ranks hold {by_rank_W.tolist()} images of it; each rank must have equally many, and some"
        )
    share = len(rows.host_n) // world_size
    own_b = rows.device_n[dist.get_rank() * share :][:share] - batch.start
    host_n = host_ids_N[rows.host_n] if batch.host_ids_N is not None else None
    return GlobalBatch(batch.local_BD[own_b], batch.local_ids_B[own_b], batch.ids_N[rows.device_n], host_n)
