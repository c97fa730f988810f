"""The guided matching loss beside the same written in loops, over ranks, in chunks, and in a training's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError

from configs.schema import ModelConfig, Recipe
from memory.gradient_cache import GradientCache
from memory.guided_loss import guided_loss
from model.network import build_model
from tests.pretend_step import recipe_of, steps_on_cpu
from tests.ranks import on_ranks
from trainer.guided import GuidedTerm, guided_bytes

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
    local = F.normalize(patches[:6, :, :CHANNELS], dim=-1).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return guided_loss(x, salient[:6], [3, 3], temperature=TEMPERATURE, match_thresh=THRESH).loss

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


GUIDED: dict[str, Any] = {
    "loss": {"guided_weight": 0.5},
    "model": {"finetune_last_n_blocks": 2},
    "data": {"augmentation": "none"},
    "eval": {"rerank": {"nn_match_thresh": 0.1}},
    "memory": {"size": 0},
}


def with_guided(changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**GUIDED.get(name, {}), **changes.get(name, {})} for name in {**GUIDED, **changes}}


def gradients(**changes: dict[str, Any]) -> tuple[dict[str, float], float, dict[str, torch.Tensor]]:
    """Figures, loss and the gradients before the update of one step."""
    steps = steps_on_cpu(recipe_of(**with_guided(changes)))
    found: dict[str, torch.Tensor] = {}
    for name, parameter in steps.state.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    outcome = steps.next()
    return outcome.figures, outcome.loss, found


def test_a_step_trains_local_features_too(single_process: None) -> None:
    """Chunks, and blocks that run again in the backward pass, have the gradient of the plain step (1e-5)."""
    figures, loss, plain = gradients()
    _, without, other = gradients(loss={"guided_weight": 0.0})
    assert loss == pytest.approx(without + 0.5 * figures["guided_loss"])
    assert figures["guided_matches"] > 0
    assert 0 < figures["guided_patches"] <= 4
    assert 0.1 < figures["guided_cosine"] <= 1.0001
    name = "backbone.blocks.2.attn.qkv.weight"
    assert (plain[name] - other[name]).abs().max() > 1e-4
    for changes in ({"engine": {"zero_stage": 0, "encode_chunks": 4}}, {"engine": {"zero_stage": 0, "activation_checkpointing": True}}):
        again, same, found = gradients(**changes)
        assert same == pytest.approx(loss, rel=1e-5)
        assert again == pytest.approx(figures, rel=1e-4)
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"compile": True}}, "compiled blocks show no local features; use engine.compile false"),
        ({"model": {"finetune_last_n_blocks": 1}}, "block 2 of 4, and blocks from 3 on.*finetune_last_n_blocks to 2"),
        ({"model": {"finetune": "head", "aggregator": "gem"}}, "model.finetune head trains no block"),
        ({"loss": {"guided_weight": -1}}, "greater than or equal to 0"),
    ],
)
def test_what_it_cannot_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of(**with_guided(changes))


def test_lora_that_local_features_do_not_see_is_refused_at_the_first_step(single_process: None) -> None:
    model = {"finetune": "lora", "finetune_last_n_blocks": 2, "lora_targets": ["mlp"]}
    with pytest.raises(ValueError, match="no trained weight comes before the value of block 2"):
        steps_on_cpu(recipe_of(**{**GUIDED, "model": model})).next()


def test_the_plan_counts_it() -> None:
    recipe = recipe_of(**GUIDED)
    assert guided_bytes(recipe, 2) == 4 * (3 * 9 * 4 * 128 + 6 * (3 * 4) ** 2)
    off = Recipe.model_validate({"model": ModelConfig(backbone="tiny14").model_dump()})
    assert guided_bytes(off, 1) == 0
