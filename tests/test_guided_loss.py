"""The guided matching loss beside the same written in loops, over ranks, in chunks, and in a training's step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from memory.gradient_cache import GradientCache
from memory.guided_loss import guided_loss
from model.network import build_model
from tests.pretend_step import recipe_of
from tests.ranks import on_ranks
from trainer.guided import GuidedTerm

PLACES, PATCHES, IN, CHANNELS = 4, 7, 9, 6
TEMPERATURE, THRESH = 0.2, 0.1


def in_loops(local_BNC: torch.Tensor, salient_BN: torch.Tensor, views: list[int]) -> torch.Tensor:
    """Sum of L_p, patch by patch, as the module's first lines define it."""
    total = local_BNC.sum() * 0
    first = 0
    for count in views:
        images, masks = local_BNC[first : first + count], salient_BN[first : first + count]
        first += count
        losses = []
        for a in range(count):
            for b in range(count):
                if a == b:
                    continue
                mine, other = masks[a].nonzero()[:, 0].tolist(), masks[b].nonzero()[:, 0].tolist()
                cosine = {(n, m): images[a][n] @ images[b][m] for n in mine for m in other}
                found = []
                for n, m in cosine:
                    nearest = max(other, key=lambda k, n=n: float(cosine[n, k].detach()))
                    back = max(mine, key=lambda k, m=m: float(cosine[k, m].detach()))
                    if nearest == m and back == n and cosine[n, m] > THRESH:
                        logits = torch.stack([cosine[n, k] for k in other]) / TEMPERATURE
                        found.append(logits.logsumexp(0) - cosine[n, m] / TEMPERATURE)
                if found:
                    losses.append(torch.stack(found).mean())
        if losses:
            total = total + torch.stack(losses).mean()
    return total


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches [B, N, IN] of 4 places with 3 views each, alike within a place; salient ones; places."""
    generator = torch.Generator().manual_seed(3)
    places = torch.randn(PLACES, 1, PATCHES, IN, generator=generator, dtype=torch.float64)
    noise = torch.randn(PLACES, 3, PATCHES, IN, generator=generator, dtype=torch.float64)
    salient_BN = torch.rand(3 * PLACES, PATCHES, generator=generator) > 0.25
    salient_BN[5] = False  # an image of nothing but sky
    return (places + 0.4 * noise).flatten(0, 1), salient_BN, torch.arange(PLACES).repeat_interleave(3)


def term(weight: float = 0.7) -> GuidedTerm:
    rerank = {"nn_match_thresh": THRESH}
    loss = {"guided_weight": weight, "guided_temperature": TEMPERATURE}
    recipe = recipe_of(loss=loss, eval={"rerank": rerank}, model={"finetune_last_n_blocks": 2})
    return GuidedTerm(recipe, build_model(recipe.model))


def check_ranks_and_chunks_have_the_gradient_of_one_process() -> None:
    """Loss and parameter gradient of a mean over ranks, 1e-10; chunks cut places."""
    rank, world = dist.get_rank(), dist.get_world_size()
    patches, salient, ids = batch()
    guided = term()
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(IN, CHANNELS, generator=generator, dtype=torch.float64)
    own = slice(rank * len(ids) // world, (rank + 1) * len(ids) // world)

    weight = start.clone().requires_grad_()
    expected = guided.weight * in_loops(F.normalize(patches @ weight, dim=-1), salient, [3] * PLACES) / PLACES
    (right,) = torch.autograd.grad(expected, weight)
    assert right.norm() > 0.01
    for chunks in (1, 2):
        weight = start.clone().requires_grad_()

        def encode(x: torch.Tensor, weight: torch.Tensor = weight) -> tuple[torch.Tensor, ...]:
            numbers = x[:, 0, -1].long()
            return F.normalize(x[:, :, :-1] @ weight, dim=-1), salient[numbers]

        numbered = torch.cat([patches, torch.arange(len(ids)).double()[:, None, None].expand(-1, PATCHES, 1)], dim=2)
        cache = GradientCache(encode, numbered[own].tensor_split(chunks)) if chunks > 1 else None
        out = guided(*(cache.outputs if cache else encode(numbered[own])), ids[own], ids)
        if cache:
            cache.backward(out.loss, lambda part: part.backward())
        else:
            out.loss.backward()
        assert weight.grad is not None
        dist.all_reduce(weight.grad)
        torch.testing.assert_close(weight.grad / world, right, rtol=1e-10, atol=1e-12)
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world, expected.detach(), rtol=1e-10, atol=1e-12)
        assert (out.num_places, out.num_pairs) == (PLACES, 6 * PLACES)


test_on_ranks = on_ranks(__file__)


def test_gradient_by_differences() -> None:
    patches, salient, _ = batch()
    local, salient = F.normalize(patches[1:6, :4, :3], dim=-1).requires_grad_(), salient[1:6, :4]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return guided_loss(x, salient, [2, 3], temperature=TEMPERATURE, match_thresh=THRESH).loss

    assert torch.autograd.gradcheck(loss, local, atol=1e-8)


def test_places_without_a_match_add_nothing() -> None:
    """One view, no salient patch, or no cosine above the threshold: loss and gradient 0, not NaN."""
    local = F.normalize(batch()[0][:4, :, :CHANNELS], dim=-1).float().requires_grad_()
    nothing, everything = torch.zeros(4, PATCHES, dtype=torch.bool), torch.ones(4, PATCHES, dtype=torch.bool)
    for salient, views, thresh in ((nothing, [2, 2], 0.1), (everything, [1, 1, 1, 1], 0.1), (everything, [4], 1.5)):
        found = guided_loss(local, salient, views, temperature=0.1, match_thresh=thresh)
        (gradient,) = torch.autograd.grad(found.loss, local)
        assert found.loss == found.matches == found.cosines == 0
        assert not gradient.any()


def test_equal_images_match_in_every_patch() -> None:
    local = F.normalize(torch.randn(1, PATCHES, CHANNELS), dim=-1).expand(3, -1, -1)
    salient = torch.ones(3, PATCHES, dtype=torch.bool)
    found = guided_loss(local, salient, [3], temperature=0.1, match_thresh=0.5)
    assert found.matches == 6 * PATCHES
    assert found.cosines.item() == pytest.approx(6 * PATCHES)
    assert found.patches == 3 * PATCHES
