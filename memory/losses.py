"""Metric-learning losses over tiles, with the age weight on memory negatives.

Named and defined as in pytorch-metric-learning, whose defaults they keep unless said otherwise. A loss is a callable
that takes a `Tile` and what its miner kept, and returns its `Term`s, differentiable in the tile's similarities. A
line of LOSSES in configs/registry.py makes it known by name; a dataclass's fields are its arguments in a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memory.tiles import Mined, Term, Tile, euclidean, log_sum_exp_of_negatives


class Loss(Protocol):
    """A loss of the anchors of a tile.

    `arrays` is how many [A, R] arrays are held at once, for the memory bound. With `weighs_anchors` the tile brings
    each anchor's share of mined pairs, which costs a second pass.
    """

    arrays: int
    weighs_anchors: bool

    def __call__(self, tile: Tile, mined: Mined) -> list[Term]: ...


def _log_sum_exp(x_AK: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over K [A]; where all are -inf it is -inf, with a gradient of 0 and not NaN."""
    if not x_AK.shape[1]:
        return x_AK.new_full((len(x_AK),), -torch.inf)
    top_A = x_AK.detach().amax(dim=1)
    top_A = top_A.masked_fill(top_A == -torch.inf, 0)
    sum_A = (x_AK - top_A[:, None]).exp().sum(dim=1)
    some_A = sum_A > 0
    return torch.where(some_A, torch.where(some_A, sum_A, 1).log() + top_A, -torch.inf)


def _log_sum_exp_of_positives(tile: Tile, kept_AP: torch.Tensor, *, scale: float, base: float) -> torch.Tensor:
    """log of the sum over kept positives of exp(scale * (similarity - base)) [A]; -inf where none is kept."""
    return _log_sum_exp((scale * (tile.positive_AP - base)).masked_fill(kept_AP == 0, -torch.inf))


def _log_add(x_A: torch.Tensor, y_A: torch.Tensor) -> torch.Tensor:
    """log(exp x + exp y)."""
    return _log_sum_exp(torch.stack([x_A, y_A], dim=1))


@dataclass(frozen=True)
class MultiSimilarityLoss:
    """Wang et al., CVPR 2019, weighted by age; alpha 1 and base 0 as VPR uses it (the library: 2 and 0.5).

    L_i = 1/alpha log(1 + sum_p exp(-alpha (s_ip - base))) + 1/beta log(1 + sum_n w_n exp(beta (s_in - base))),
    mean over anchors.
    """

    alpha: float = 1.0
    beta: float = 50.0
    base: float = 0.0
    arrays = 2
    weighs_anchors = False

    def __call__(self, tile: Tile, mined: Mined) -> list[Term]:
        pull_A = _log_sum_exp_of_positives(tile, mined.positive_AP, scale=-self.alpha, base=self.base)
        push_A = log_sum_exp_of_negatives(tile, mined.negative_AR, scale=self.beta, base=self.base)
        one_A = torch.zeros_like(pull_A)
        loss_A = _log_add(one_A, pull_A) / self.alpha + _log_add(one_A, push_A) / self.beta
        return [Term(loss_A.sum(), len(loss_A))]


@dataclass(frozen=True)
class ContrastiveLoss:
    """Hadsell et al., CVPR 2006, on Euclidean distance d.

    The mean of max(0, d - pos_margin) over the positive pairs where it is above 0, plus the mean of
    w max(0, neg_margin - d) over the negative pairs where neg_margin > d.
    """

    pos_margin: float = 0.0
    neg_margin: float = 1.0
    arrays = 8
    weighs_anchors = False

    def __call__(self, tile: Tile, mined: Mined) -> list[Term]:
        pull_AP = (euclidean(tile.positive_AP) - self.pos_margin).relu()
        push_AR = (self.neg_margin - euclidean(tile.negative_AR)).relu()
        return [
            Term((mined.count_AP * pull_AP).sum(), (mined.count_AP * (pull_AP > 0)).sum()),
            Term(
                tile.ranks.sum((mined.count_AR * tile.log_weight_R.exp() * push_AR).sum()),
                tile.ranks.sum((mined.count_AR * (push_AR > 0)).sum().detach()),
            ),
        ]


@dataclass(frozen=True)
class TripletMarginLoss:
    """The mean of w_n max(0, d_ap - d_an + margin), Euclidean, over the triplets where it is above 0."""

    margin: float = 0.05
    arrays = 9
    weighs_anchors = False

    def __call__(self, tile: Tile, mined: Mined) -> list[Term]:
        positive_AP, negative_AR = tile.ranks.share(euclidean(tile.positive_AP)), euclidean(tile.negative_AR)
        total, count = _TripletHinge.apply(positive_AP, negative_AR, tile.log_weight_R.exp(), mined, self.margin)
        return [Term(tile.ranks.sum(total), tile.ranks.sum(count))]


class _TripletHinge(torch.autograd.Function):
    """Sum and count of violated triplets, one positive slot at a time, its gradient on the way: no triplet list."""

    @staticmethod
    def forward(
        ctx: Any, d_AP: torch.Tensor, d_AR: torch.Tensor, weight_R: torch.Tensor, mined: Mined, margin: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = d_AP.new_zeros(()), d_AP.new_zeros(())
        grad_AP, grad_AR = torch.zeros_like(d_AP), torch.zeros_like(d_AR)
        for slot in range(d_AP.shape[1]):
            violation_AR = d_AP[:, slot, None] + margin - d_AR
            violated_AR = (mined.negatives_of(slot) & (violation_AR > 0)).to(d_AR)
            count += violated_AR.sum()
            violated_AR.mul_(weight_R)
            total += (violation_AR.clamp_(min=0) * violated_AR).sum()
            grad_AP[:, slot] = violated_AR.sum(1)
            grad_AR.sub_(violated_AR)
        ctx.save_for_backward(grad_AP, grad_AR)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_AP, grad_AR = ctx.saved_tensors
        return grads[0] * grad_AP, grads[0] * grad_AR, None, None, None


@dataclass(frozen=True)
class NCALoss:
    """Goldberger et al., NIPS 2004, on squared Euclidean distance: -log of the softmax mass on the anchor's place.

    All pairs enter, memory negatives with their weight; a miner sets the anchors' weights (the number of pairs an
    image is in, over the greatest such number). Mean over the anchors that have a positive.
    """

    softmax_scale: float = 1.0
    arrays = 3
    weighs_anchors = True

    def __call__(self, tile: Tile, mined: Mined) -> list[Term]:  # noqa: ARG002
        scale, base = 2 * self.softmax_scale, 1.0  # -d^2 = 2 (s - 1)
        place_A = _log_sum_exp_of_positives(tile, tile.is_positive_AP, scale=scale, base=base)
        if tile.meets_itself:
            place_A = _log_add(place_A, torch.zeros_like(place_A))
        others_A = log_sum_exp_of_negatives(tile, None, scale=scale, base=base)
        counted_A = place_A > -torch.inf
        loss_A = _log_add(place_A, others_A) - place_A.masked_fill(~counted_A, 0)
        return [Term((tile.anchor_weight_A * loss_A)[counted_A].sum(), counted_A.sum())]
