"""The hardest negatives that the queue gives to a batch, for a table that people look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.schema import MemoryConfig
from memory.decay import log_weight
from memory.gather import all_gather
from memory.near_places import NearPlaces
from memory.queue import MemoryQueue
from memory.set_queues import SetQueues

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class HardNegatives:
    """Of n places of a batch, hardest first: the image and the entry of another place that are most alike.

    The same on every rank. `row_n` is the image's row of the global batch, `negative_n` the entry's place, `stored_n`
    the optimizer step that stored it, `newer_n` how many entries of that place and step lie behind it in the queue.
    """

    row_n: Int64
    place_n: Int64
    negative_n: Int64
    stored_n: Int64
    newer_n: Int64
    cosine_n: Float64
    weight_n: Float64  # by the recipe's decay at its age

    def __len__(self) -> int:
        """The number of places n."""
        return len(self.row_n)


@torch.no_grad()
def hardest_negatives(
    queue: MemoryQueue | SetQueues,
    descriptors_ND: torch.Tensor,
    host_ids_N: torch.Tensor,
    *,
    step: int,
    most: int,
    config: MemoryConfig,
    curve_a2: torch.Tensor,
    near: NearPlaces | None = None,
    has_weights: bool = True,
) -> HardNegatives:
    """The `most` places of a global batch whose hardest negative in the queue is the most similar; fewer if there are
    fewer, none from an empty queue. Every rank must call this, with the same batch, before the batch is stored.

    A negative is an entry of another place that `near` does not have near to the anchor's. Each rank compares a share
    of the pairs, within `config.tile_mb`. The host waits for the device. Without `has_weights` all weights are 1.
    """
    parts = [(queue, torch.arange(len(host_ids_N)))] if isinstance(queue, MemoryQueue) else []
    if isinstance(queue, SetQueues):
        rows = queue.sets.rows(host_ids_N, descriptors_ND.device)
        parts = [(queue.of_set(number), of_set.host_n) for number, of_set in enumerate(rows)]
    found = [
        _of_one_queue(own, descriptors_ND, host_ids_N, row_n, config.tile_mb << 20, near)
        for own, row_n in parts
        if len(own) and len(row_n)
    ]
    row_n, place_n, negative_n, stored_n, newer_n, cosine_n = (
        np.concatenate([part[k] for part in found]) if found else np.zeros(0) for k in range(6)
    )
    order_n = np.lexsort((place_n, -cosine_n))[:most]
    weight_n = np.ones(len(order_n))
    if has_weights:
        age_n = torch.from_numpy(step - stored_n[order_n]).double()
        weight_n = log_weight(age_n, config, curve_a2.double().cpu()).exp().numpy()
    row_n, place_n, negative_n, stored_n, newer_n = (
        values[order_n].astype(np.int64) for values in (row_n, place_n, negative_n, stored_n, newer_n)
    )
    cosine_n = cosine_n[order_n].astype(np.float64)
    return HardNegatives(row_n, place_n, negative_n, stored_n, newer_n, cosine_n, weight_n)


def _of_one_queue(
    queue: MemoryQueue,
    descriptors_ND: torch.Tensor,
    host_ids_N: torch.Tensor,
    row_n: torch.Tensor,
    tile_bytes: int,
    near: NearPlaces | None,
) -> tuple[NDArray[np.generic], ...]:
    """Rows, places, negatives' places, their steps, newer entries and cosines of the places of these rows."""
    device = descriptors_ND.device
    anchors_nD = descriptors_ND[row_n.to(device)].float()
    cosine_n, slot_n = _nearest(queue, anchors_nD, host_ids_N[row_n].to(device), tile_bytes, near)
    cosines, slots = cosine_n.double().cpu().numpy(), slot_n.cpu().numpy()
    rows, places = row_n.numpy(), host_ids_N[row_n].numpy()
    order_n = np.lexsort((rows, -cosines, places))
    first_n = np.unique(places[order_n], return_index=True)[1]
    best_p = order_n[first_n]  # the hardest of each place
    best_p = best_p[np.isfinite(cosines[best_p])]
    slot_p = torch.from_numpy(slots[best_p]).to(device)
    negative_p, stored_p = queue.place_ids_M[slot_p], queue.steps_M[slot_p]
    oldest = int(queue.num_enqueued) % queue.size if len(queue) == queue.size else 0
    rank_M = (torch.arange(queue.size, device=device) - oldest) % queue.size  # 0: the oldest entry
    newer_p = torch.stack(
        [
            ((queue.place_ids_M == place) & (queue.steps_M == stored) & (rank_M > rank_M[slot])).sum()
            for place, stored, slot in zip(negative_p, stored_p, slot_p, strict=True)
        ]
        or [torch.zeros((), dtype=torch.int64, device=device)]
    )[: len(slot_p)]
    on_host = (values.cpu().numpy() for values in (negative_p, stored_p, newer_p))
    return rows[best_p], places[best_p], *on_host, cosines[best_p]


def _nearest(
    queue: MemoryQueue, anchors_nD: torch.Tensor, ids_n: torch.Tensor, tile_bytes: int, near: NearPlaces | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and slot of each anchor's most similar negative of all ranks; -inf where there is none."""
    rank, world_size, entries = dist.get_rank(), dist.get_world_size(), queue.entries()
    own_n = torch.arange(len(anchors_nD), device=anchors_nD.device)
    if queue.num_shards == 1:  # each rank takes a share of the anchors, as many as every other
        share = -(-len(anchors_nD) // world_size)
        own_n = own_n.new_tensor(range(rank * share, (rank + 1) * share)).clamp(max=len(anchors_nD) - 1)
    columns_mD = entries.descriptors_nD.float()
    cosine_a, slot_a = anchors_nD.new_full((len(own_n),), -torch.inf), torch.zeros_like(own_n)
    near_4R = near.columns(entries.place_ids_n) if near else None
    rows = max(1, tile_bytes // max(1, len(columns_mD) * (13 if near else 5)))
    for start in range(0, len(own_n) if len(columns_mD) else 0, rows):
        some = own_n[start : start + rows]
        cosine_am = anchors_nD[some] @ columns_mD.T
        cosine_am.masked_fill_(ids_n[some, None] == entries.place_ids_n, -torch.inf)
        if near and near_4R is not None:
            buffer = cosine_am.new_empty(len(some), len(columns_mD) + 1, dtype=torch.float64)
            cosine_am.masked_fill_(near.rows(ids_n[some], near_4R, buffer)[:, :-1], -torch.inf)
        best = cosine_am.max(dim=1)
        cosine_a[start : start + rows] = best.values
        slot_a[start : start + rows] = best.indices * queue.num_shards + queue.rank
    if queue.num_shards == 1:
        return all_gather(cosine_a)[: len(anchors_nD)], all_gather(slot_a)[: len(anchors_nD)]
    cosine_Wn, slot_Wn = all_gather(cosine_a[None]), all_gather(slot_a[None])
    top_n = cosine_Wn.amax(dim=0)
    return top_n, slot_Wn.masked_fill(cosine_Wn < top_n, queue.size).amin(dim=0)
