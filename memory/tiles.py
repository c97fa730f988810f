"""What a miner and a loss see: some anchors against the references whose descriptors this rank keeps.

Shapes: A anchors of the tile, P slots for the positives of an anchor, R reference columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class ReferenceRanks:
    """The ranks that hold the other references of the same anchors: none when the queue is replicated, else all.

    A loss that calls `sum` on what it adds up over references, and `share` on positives that it combines with single
    references, has the same value on every rank and the gradient of one process that holds all references.
    """

    def __init__(self, *, all_of_them: bool) -> None:
        self.are_others = all_of_them and dist.get_world_size() > 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; each rank's summand gets the gradient of the sum."""
        out: torch.Tensor = _SumOverRanks.apply(x) if self.are_others else x
        return out

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, equal on all ranks, for use with this rank's references; its gradient is summed over ranks."""
        out: torch.Tensor = _ShareWithRanks.apply(x) if self.are_others else x
        return out

    @torch.no_grad()
    def max(self, x: torch.Tensor) -> torch.Tensor:
        """Greatest over ranks, without gradient."""
        if self.are_others:
            x = x.detach().clone()
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grads[0]


class _ShareWithRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


@dataclass(frozen=True)
class Tile:
    """Anchors, all their positives, and this rank's references as negatives. Similarities are cosines."""

    positive_AP: torch.Tensor  # the same on every rank; 0 in slots that hold none
    is_positive_AP: torch.Tensor
    negative_AR: torch.Tensor  # -inf where the reference is of the anchor's place
    log_weight_R: torch.Tensor  # 0 inside the batch
    anchor_weight_A: torch.Tensor  # 1, or the anchor's share of mined pairs for a loss that asks for it
    ranks: ReferenceRanks
    meets_itself: bool  # the anchor's own stored copy is among the references, as in CrossBatchMemory

    @cached_property
    def hardest_positive_A(self) -> torch.Tensor:
        """Least similarity to a positive, without gradient; inf where there is none."""
        if not self.positive_AP.shape[1]:
            return self.negative_AR.new_full((len(self.negative_AR),), torch.inf)
        return self.positive_AP.detach().masked_fill(~self.is_positive_AP, torch.inf).amin(dim=1)

    @cached_property
    def hardest_negative_A(self) -> torch.Tensor:
        """Greatest similarity to a negative of any rank, without gradient; -inf where there is none."""
        return self.ranks.max(self.negative_AR.detach().amax(dim=1))


@dataclass(frozen=True)
class Mined:
    """The pairs that a miner keeps, as 1 and 0.

    A miner of triplets also tells in how many triplets each pair is (`_AP` over the references of all ranks), and the
    negatives of the triplets of a positive's slot.
    """

    positive_AP: torch.Tensor
    negative_AR: torch.Tensor
    triplets_AP: torch.Tensor | None = None
    triplets_AR: torch.Tensor | None = None
    triplets_of: Callable[[int], torch.Tensor] | None = None

    @property
    def count_AP(self) -> torch.Tensor:
        """How often each positive pair counts."""
        return self.positive_AP if self.triplets_AP is None else self.triplets_AP

    @property
    def count_AR(self) -> torch.Tensor:
        """How often each negative pair counts."""
        return self.negative_AR if self.triplets_AR is None else self.triplets_AR

    def negatives_of(self, slot: int) -> torch.Tensor:
        """Bool [A, R]: the negatives that form a triplet with the positive of a slot."""
        if self.triplets_of is not None:
            return self.triplets_of(slot)
        return (self.negative_AR > 0) & (self.positive_AP[:, slot, None] > 0)


class Term(NamedTuple):
    """A part of a loss: its sum over the tile's anchors, and what the sum over all tiles is divided by (at least 1)."""

    total: torch.Tensor
    divisor: torch.Tensor | int


def euclidean(similarity: torch.Tensor) -> torch.Tensor:
    """Distance of two unit vectors of that cosine; its gradient is 0 where they coincide."""
    square = (2 - 2 * similarity).clamp(min=0)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def log_sum_exp_of_negatives(tile: Tile, kept_AR: torch.Tensor | None, *, scale: float, base: float) -> torch.Tensor:
    """log of the sum over kept negatives of weight * exp(scale * (similarity - base)), over all ranks [A].

    -inf where none is kept; `kept_AR` None keeps all, and is overwritten otherwise. The gradient with respect to the
    similarities is exact also where exp would overflow.
    """
    out: torch.Tensor = _LogSumExpOfNegatives.apply(tile.negative_AR, kept_AR, tile, scale, base)
    return out


class _LogSumExpOfNegatives(torch.autograd.Function):
    """In the place of `kept_AR`: exponents, then each term's share of the sum, then the gradient."""

    @staticmethod
    def forward(
        ctx: Any, negative_AR: torch.Tensor, kept_AR: torch.Tensor | None, tile: Tile, scale: float, base: float
    ) -> torch.Tensor:
        x_AR = kept_AR.log_() if kept_AR is not None else torch.zeros_like(negative_AR)
        x_AR.add_(tile.log_weight_R - scale * base).add_(negative_AR, alpha=scale)
        top_A = tile.ranks.max(x_AR.amax(dim=1))
        top_A = top_A.masked_fill(top_A == -torch.inf, 0)
        share_AR = x_AR.sub_(top_A[:, None]).exp_()
        sum_A = tile.ranks.sum(share_AR.sum(dim=1))
        share_AR.mul_(torch.where(sum_A > 0, scale / sum_A, 0)[:, None])
        ctx.save_for_backward(share_AR)
        return sum_A.log() + top_A

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (share_AR,) = ctx.saved_tensors
        return share_AR.mul_(grads[0][:, None]), None, None, None, None
