"""A loss of anchors against references in tiles of rows, its gradient formed tile by tile in the forward pass.

Shapes: A anchors, G references over all ranks (the global batch, then the queue in slot order). Of these this rank
compares with C of the batch and m memory entries, in R = C + m + 1 columns of a tile: the last belongs to no reference
and takes what the positive slots of other ranks and empty ones write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from memory.losses import Loss
from memory.miners import AllPairs, Miner
from memory.near_places import NearPlaces
from memory.pairing import Pairing
from memory.tiles import Mined, Tile


@dataclass
class _Sums:
    """What adds up over tiles, anchors and, in the end, ranks."""

    terms_T2: torch.Tensor | None = None
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    anchor_grads: list[torch.Tensor] = field(default_factory=list)
    batch_grads: list[torch.Tensor] = field(default_factory=list)


class _Placed(NamedTuple):
    """A tile, its anchors, which of its positives lie in which of this rank's columns, and what was left out."""

    rows: slice
    tile: Tile
    columns_AP: torch.Tensor
    own_AP: torch.Tensor
    near_A: torch.Tensor | None  # references of this rank that are no negatives, being too near


class TiledLoss:
    """Loss and gradient of all anchors of a `Pairing`, within `tile_bytes` of memory beside the result's.

    References of another place that `near` has near to the anchor's are neither positives nor negatives.
    """

    def __init__(
        self, loss: Loss, miner: Miner, *, tile_bytes: int, gradient_scale: float, near: NearPlaces | None = None
    ) -> None:
        self.loss, self.miner, self.near = loss, miner, near
        self.tile_bytes, self.gradient_scale = tile_bytes, gradient_scale

    def __call__(self, pairing: Pairing) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss over the anchors of all ranks, and figures of its mining; both the same on every rank."""
        stats: dict[str, torch.Tensor] = {}
        loss: torch.Tensor = _WithGradient.apply(pairing.anchors_AD, pairing.batch_CD, self, pairing, stats)
        return loss, stats

    def run(
        self, anchors_AD: torch.Tensor, batch_CD: torch.Tensor, pairing: Pairing, *, with_grad: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Loss, mining figures, and `gradient_scale` times the loss's gradients by anchors and batch references."""
        sums = _Sums()
        weight_A = self._anchor_weights(anchors_AD, batch_CD, pairing)
        for placed in self._tiles(anchors_AD, batch_CD, pairing, weight_A):
            self._add(placed, anchors_AD, batch_CD, pairing, sums, with_grad=with_grad)
        assert sums.terms_T2 is not None
        sums.terms_T2[0, 0] += (anchors_AD * 0).sum()  # a descriptor that is not finite makes the loss NaN
        flat = torch.cat([sums.terms_T2.flatten(), *(value[None] for value in sums.stats.values())])
        if not pairing.ranks.are_others:  # ranks hold different anchors
            dist.all_reduce(flat)
        terms_T2 = flat[: sums.terms_T2.numel()].view_as(sums.terms_T2)
        share_T = 1 / terms_T2[:, 1].clamp(min=1)
        loss = (terms_T2[:, 0] * share_T).sum().to(anchors_AD)
        stats = dict(zip(sums.stats, flat[terms_T2.numel() :], strict=True))
        scale_T = (self.gradient_scale * share_T).to(anchors_AD)
        anchor_grad_AD = _weighted_sum(scale_T, sums.anchor_grads, anchors_AD)
        batch_grad_CD = _weighted_sum(scale_T, sums.batch_grads, batch_CD)
        figures = _figures(stats)
        if self.near:
            figures["near_negatives"] = stats["near"] / stats["anchors"]
        return loss, figures, anchor_grad_AD, batch_grad_CD

    def _tiles(
        self, anchors_AD: torch.Tensor, batch_CD: torch.Tensor, pairing: Pairing, weight_A: torch.Tensor
    ) -> Iterator[_Placed]:
        memory, ranks = pairing.memory, pairing.ranks
        num_batch, num_columns = len(batch_CD), len(batch_CD) + len(memory.descriptors_mD)
        ids_G, order_G = pairing.reference_ids_G.sort(stable=True)
        first_A = torch.searchsorted(ids_G, pairing.anchor_ids_A)
        count_A = torch.searchsorted(ids_G, pairing.anchor_ids_A, right=True) - first_A
        counts = pairing.counts if pairing.counts is not None else count_A.cpu().numpy()
        itself_A = pairing.anchor_start + torch.arange(len(anchors_AD), device=ids_G.device)
        log_weight_R = torch.cat(
            [anchors_AD.new_zeros(num_batch), memory.log_weight_m.to(anchors_AD), anchors_AD.new_zeros(1)]
        )
        size = anchors_AD.element_size()
        column_bytes = max(self.loss.arrays * size, size + 9 if self.near else 0)  # float64 and bool of what is near
        row_bytes = column_bytes * (pairing.widest + 1) + 8 * size * int(counts.max())
        num_tiles = math.ceil(len(anchors_AD) / max(1, self.tile_bytes // row_bytes))
        num_rows = math.ceil(len(anchors_AD) / num_tiles)
        buffer_AR = anchors_AD.new_empty(num_rows, num_columns + 1)  # one for all tiles: fresh memory costs time
        near_4R = self.near.columns(pairing.column_ids()) if self.near else None
        apart_AR = buffer_AR.new_empty(buffer_AR.shape, dtype=torch.float64) if self.near else None
        for start in range(0, len(anchors_AD), num_rows):
            rows = slice(start, start + num_rows)
            similarity_AR = buffer_AR[: len(anchors_AD[rows])].detach()
            torch.mm(anchors_AD[rows], batch_CD.T, out=similarity_AR[:, :num_batch])
            torch.mm(anchors_AD[rows], memory.descriptors_mD.T, out=similarity_AR[:, num_batch:num_columns])
            similarity_AR[:, num_columns] = -torch.inf
            slots_P = torch.arange(int(counts[rows].max()), device=ids_G.device)
            same_place_AP = slots_P < count_A[rows, None]
            reference_AP = order_G[(first_A[rows, None] + slots_P).clamp(max=len(order_G) - 1)]
            is_positive_AP = same_place_AP & (reference_AP != itself_A[rows, None])
            columns_AP = pairing.column_G[reference_AP].masked_fill(~same_place_AP, -1)
            own_AP = is_positive_AP & (columns_AP >= 0)
            columns_AP = columns_AP.masked_fill(columns_AP < 0, num_columns)
            positive_AP = ranks.sum(similarity_AR.gather(1, columns_AP).masked_fill(~own_AP, 0))
            similarity_AR.scatter_(1, columns_AP, -torch.inf)
            near_A = None
            if self.near and near_4R is not None and apart_AR is not None:
                near_AR = self.near.rows(pairing.anchor_ids_A[rows], near_4R, apart_AR[: len(similarity_AR)])
                near_AR.scatter_(1, columns_AP, False)  # what is of the anchor's own place
                similarity_AR.masked_fill_(near_AR, -torch.inf)
                near_A = near_AR.sum(dim=1)
            tile = Tile(
                positive_AP.requires_grad_(),
                is_positive_AP,
                similarity_AR.requires_grad_(),
                log_weight_R,
                weight_A[rows],
                ranks,
                meets_itself=not pairing.live,
            )
            yield _Placed(rows, tile, columns_AP, own_AP, near_A)

    def _anchor_weights(self, anchors_AD: torch.Tensor, batch_CD: torch.Tensor, pairing: Pairing) -> torch.Tensor:
        """Each anchor's number of mined pairs over the greatest, for a loss that asks for it; else ones [A].

        Pairs in which an image of the batch is the reference count for it too where references are live.
        """
        one_A = anchors_AD.new_ones(len(anchors_AD))
        if not self.loss.weighs_anchors or isinstance(self.miner, AllPairs):
            return one_A
        num_batch, start, stop = len(batch_CD), pairing.anchor_start, pairing.anchor_start + len(anchors_AD)
        count_N = anchors_AD.new_zeros(pairing.batch_size)
        for placed in self._tiles(anchors_AD, batch_CD, pairing, one_A):
            with torch.no_grad():
                mined = self.miner(placed.tile)
            count_AP = mined.count_AP * placed.own_AP
            count_A = mined.count_AR.sum(1) if mined.triplets_of else mined.count_AR.sum(1) + count_AP.sum(1)
            count_N[start + placed.rows.start : start + placed.rows.start + len(count_A)] += count_A
            if pairing.live:
                as_reference_AR = mined.count_AR.scatter_(1, placed.columns_AP, count_AP)
                count_N[pairing.batch_start :][:num_batch] += as_reference_AR[:, :num_batch].sum(0)
        dist.all_reduce(count_N)
        most = count_N.max()
        return torch.where(most > 0, count_N[start:stop] / most, one_A)

    def _add(
        self,
        placed: _Placed,
        anchors_AD: torch.Tensor,
        batch_CD: torch.Tensor,
        pairing: Pairing,
        sums: _Sums,
        *,
        with_grad: bool,
    ) -> None:
        """Adds a tile's terms, figures and gradients to `sums`."""
        tile, num_batch = placed.tile, len(batch_CD)
        with torch.no_grad():
            mined = self.miner(tile)
            _add_stats(sums.stats, placed, mined, num_batch, pairing.memory.age_m)
        with torch.set_grad_enabled(with_grad):
            terms = self.loss(tile, mined)
        values_T2 = torch.stack([torch.stack([_as_double(x, anchors_AD.device) for x in term]) for term in terms])
        sums.terms_T2 = values_T2 if sums.terms_T2 is None else sums.terms_T2 + values_T2
        del mined
        for number, term in enumerate(terms if with_grad else ()):
            grad_AP, grad_AR = torch.autograd.grad(
                term.total,
                [tile.positive_AP, tile.negative_AR],
                allow_unused=True,
                retain_graph=number + 1 < len(terms),
            )
            if grad_AR is None:
                grad_AR = torch.zeros_like(tile.negative_AR)
            if grad_AP is not None:
                grad_AR.scatter_(1, placed.columns_AP, grad_AP.masked_fill(~placed.own_AP, 0))
            if number == len(sums.anchor_grads):
                sums.anchor_grads.append(torch.zeros_like(anchors_AD))
                sums.batch_grads.append(torch.zeros_like(batch_CD))
            of_batch_AC, of_memory_Am = grad_AR[:, :num_batch], grad_AR[:, num_batch:-1]
            sums.anchor_grads[number][placed.rows] = (of_batch_AC @ batch_CD).addmm_(
                of_memory_Am, pairing.memory.descriptors_mD
            )
            if pairing.live:
                sums.batch_grads[number].addmm_(of_batch_AC.T, anchors_AD[placed.rows])


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors_AD: torch.Tensor,
        batch_CD: torch.Tensor,
        tiled: TiledLoss,
        pairing: Pairing,
        stats: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        loss, found, *grads = tiled.run(
            anchors_AD.detach(), batch_CD.detach(), pairing, with_grad=any(ctx.needs_input_grad)
        )
        stats.update(found)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        anchor_grad_AD, batch_grad_CD = ctx.saved_tensors
        needs_anchors, needs_batch, *_ = ctx.needs_input_grad
        return (
            grads[0] * anchor_grad_AD if needs_anchors else None,
            grads[0] * batch_grad_CD if needs_batch else None,
            None,
            None,
            None,
        )


def _weighted_sum(weight_T: torch.Tensor, terms: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sum of terms times their weights, in the memory of the first: of a large batch a term is hundreds of MB."""
    if not terms:
        return torch.zeros_like(like)
    for weight, term in zip(weight_T, terms, strict=True):
        term.mul_(weight)
    for term in terms[1:]:
        terms[0].add_(term)
    return terms[0]


def _as_double(x: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.detach().double()
    return torch.full((), x, dtype=torch.float64, device=device)


def _add_stats(
    stats: dict[str, torch.Tensor], placed: _Placed, mined: Mined, num_batch: int, age_m: torch.Tensor
) -> None:
    """Adds up, over the anchors of a tile, what is known once its pairs are mined."""
    tile = placed.tile
    figures_R3 = tile.negative_AR.new_zeros(tile.negative_AR.shape[1], 3)
    figures_R3[:, 0] = 1
    figures_R3[num_batch:-1, 1] = 1
    figures_R3[num_batch:-1, 2] = age_m.to(figures_R3)
    counts_A3 = mined.negative_AR @ figures_R3
    if placed.near_A is not None:
        counts_A3 = torch.cat([counts_A3, placed.near_A[:, None].to(counts_A3)], dim=1)
    negatives_A3 = tile.ranks.sum(counts_A3).double()
    positives_A = mined.positive_AP.double().sum(1)
    hardest_negative_A, hardest_positive_A = tile.hardest_negative_A.double(), tile.hardest_positive_A.double()
    sums = {
        "anchors": torch.ones_like(positives_A),
        "positives": positives_A,
        "negatives": negatives_A3[:, 0],
        "memory_negatives": negatives_A3[:, 1],
        "memory_negatives_age": negatives_A3[:, 2],
        "trivial": (positives_A + negatives_A3[:, 0] == 0).double(),
        "with_negative": hardest_negative_A.isfinite().double(),
        "hardest_negative": hardest_negative_A.nan_to_num(0, 0, 0),
        "with_positive": hardest_positive_A.isfinite().double(),
        "hardest_positive": hardest_positive_A.nan_to_num(0, 0, 0),
    }
    if placed.near_A is not None:
        sums["near"] = negatives_A3[:, 3]
    for name, values_A in sums.items():
        stats[name] = stats.get(name, 0) + values_A.sum()


def _figures(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Figures of mining over the global batch."""
    return {
        "mined_positives": sums["positives"] / sums["anchors"],
        "mined_negatives": sums["negatives"] / sums["anchors"],
        "trivial_anchors": sums["trivial"] / sums["anchors"],
        "negatives_from_memory": sums["memory_negatives"] / sums["negatives"].clamp(min=1),
        "mined_negative_age": sums["memory_negatives_age"] / sums["negatives"].clamp(min=1),
        "hardest_negative": sums["hardest_negative"] / sums["with_negative"].clamp(min=1),
        "hardest_positive": sums["hardest_positive"] / sums["with_positive"].clamp(min=1),
    }
