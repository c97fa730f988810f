"""The guided matching loss: it trains the local features that re-ranking matches, on the places of the batch.

Of two images a and b of a place, with salient patches S_a and S_b, unit vectors u_n and v_m, s_nm = u_n . v_m:

    M_ab = {(n, m): each the other's nearest among salient patches, s_nm > match_thresh}
    l_ab = mean over M_ab of  log(sum over m' in S_b of exp(s_nm' / temperature)) - s_nm / temperature
    L_p  = mean of l_ab over the ordered pairs of images of place p that have a match; 0 if none has one
    L    = mean of L_p over the places of the global batch

Mutual matches of salient patches, pulled together, are RerankVPR's guided matching (`losses/guided_matching_loss.py` of
its published code: their mean cosine) and SelaVPR's local loss (ICLR 2024). Here a match also pushes the other salient
patches of b away, by the cross entropy of InfoNCE (van den Oord et al., 2018), as LoFTR trains its matches (CVPR 2021):
cosines alone are largest where all patches are equal. Which patches match carries no gradient.

No place asks for another's images, so that a rank computes the places that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

NOT_SALIENT = -1e4  # in the place of a cosine: its exponential is 0 at any temperature


class GuidedLoss(NamedTuple):
    """Sums over the places of this rank; the gradient is of the first."""

    loss: torch.Tensor  # sum of L_p
    matches: torch.Tensor  # over ordered pairs of images
    cosines: torch.Tensor  # of the matches
    patches: torch.Tensor  # salient ones


def place_loss(
    local_KNC: torch.Tensor, salient_KN: torch.Tensor, *, temperature: float, match_thresh: float
) -> GuidedLoss:
    """L_p of one place, whose K images have N L2-normalised patches each, and its figures."""
    views, patches = salient_KN.shape
    flat_XC = local_KNC.flatten(0, 1)
    cosine_KNKN = (flat_XC @ flat_XC.T).unflatten(1, (views, patches)).unflatten(0, (views, patches))
    among_KNKN = cosine_KNKN.masked_fill(~salient_KN, NOT_SALIENT)
    best_KNK, nearest_KNK = among_KNKN.max(dim=3)
    best_KKN, forth_KKN = best_KNK.transpose(1, 2), nearest_KNK.transpose(1, 2)  # [a, b, n]
    back_KKN = nearest_KNK.permute(2, 0, 1)  # [a, b, m]: of patch m of b, the nearest of a
    matched_KKN = back_KKN.gather(2, forth_KKN) == torch.arange(patches, device=salient_KN.device)
    matched_KKN &= salient_KN[:, None] & (best_KKN > match_thresh)
    matched_KKN &= ~torch.eye(views, dtype=torch.bool, device=salient_KN.device)[:, :, None]
    entropy_KKN = (among_KNKN / temperature).logsumexp(dim=3).transpose(1, 2) - best_KKN / temperature
    count_KK = matched_KKN.sum(dim=2)
    loss_KK = (entropy_KKN * matched_KKN).sum(dim=2) / count_KK.clamp(min=1)
    return GuidedLoss(
        loss=loss_KK.sum() / (count_KK > 0).sum().clamp(min=1),
        matches=count_KK.sum().to(local_KNC.dtype),
        cosines=(best_KKN * matched_KKN).sum().detach(),
        patches=salient_KN.sum().to(local_KNC.dtype),
    )


def guided_loss(
    local_BNC: torch.Tensor,
    salient_BN: torch.Tensor,
    views: Sequence[int],
    *,
    temperature: float,
    match_thresh: float,
) -> GuidedLoss:
    """Sums over places, of which `views` says how many images each has; those of a place follow each other.

    The similarities of one place are held at a time: its part of the gradient is formed with them.
    """
    return GuidedLoss(*_PlaceByPlace.apply(local_BNC, salient_BN, list(views), temperature, match_thresh))


class _PlaceByPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local_BNC: torch.Tensor,
        salient_BN: torch.Tensor,
        views: list[int],
        temperature: float,
        match_thresh: float,
    ) -> tuple[torch.Tensor, ...]:
        sums_4 = local_BNC.new_zeros(4)
        gradients = []
        for place_KNC, salient_KN in zip(local_BNC.split(views), salient_BN.split(views), strict=True):
            with torch.enable_grad():
                leaf_KNC = place_KNC.detach().requires_grad_()
                found = place_loss(leaf_KNC, salient_KN, temperature=temperature, match_thresh=match_thresh)
                gradients.append(torch.autograd.grad(found.loss, leaf_KNC)[0])
            sums_4 = sums_4 + torch.stack([part.detach() for part in found])
        ctx.save_for_backward(torch.cat(gradients))
        loss, *figures = sums_4.unbind()
        ctx.mark_non_differentiable(*figures)
        return loss, *figures

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient_BNC,) = ctx.saved_tensors
        return gradient_BNC * grads[0], None, None, None, None
