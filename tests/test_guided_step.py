"""The guided matching loss in a training's step: with chunks and blocks that run again; what it cannot train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from configs.schema import ModelConfig, Recipe
from tests.pretend_step import recipe_of, steps_on_cpu
from tests.ranks import on_ranks
from trainer.guided import guided_bytes

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


def check_a_step_trains_local_features_too() -> None:
    """Chunks, and blocks that run again in the backward pass, have the gradient of the plain step (1e-5)."""
    figures, loss, plain = gradients()
    _, without, other = gradients(loss={"guided_weight": 0.0})
    assert loss == pytest.approx(without + 0.5 * figures["guided_loss"])
    assert figures["guided_matches"] > 0
    assert 0 < figures["guided_patches"] <= 4
    assert 0.1 < figures["guided_cosine"] <= 1.0001
    name = "backbone.blocks.2.attn.qkv.weight"
    assert (plain[name] - other[name]).abs().max() > 1e-4
    for how in ({"encode_chunks": 4}, {"activation_checkpointing": True}):
        again, same, found = gradients(engine={"zero_stage": 0, **how})
        assert same == pytest.approx(loss, rel=1e-5)
        assert again == pytest.approx(figures, rel=1e-4)
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def check_lora_that_local_features_do_not_see_is_refused_at_the_first_step() -> None:
    model = {"finetune": "lora", "finetune_last_n_blocks": 2, "lora_targets": ["mlp"]}
    with pytest.raises(ValueError, match="no trained weight comes before the value of block 2"):
        steps_on_cpu(recipe_of(**{**GUIDED, "model": model})).next()


test_on_ranks = on_ranks(__file__, world_sizes=(1, 2))


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


def test_the_plan_counts_it() -> None:
    recipe = recipe_of(**GUIDED)
    assert guided_bytes(recipe, 2) == 4 * (3 * 9 * 4 * 128 + 6 * (3 * 4) ** 2)
    off = Recipe.model_validate({"model": ModelConfig(backbone="tiny14").model_dump()})
    assert guided_bytes(off, 1) == 0
