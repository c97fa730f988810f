"""What is trained, in which precision, and two ways of running it that change no number."""

from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from model.network import build_model
from tests.compiled_blocks import check_compiled_blocks, loss_and_gradients, tiny
from tests.networks import AGGREGATORS


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"finetune": "all"}, {0, 1, 2, 3, 4, 5}),
        ({"finetune": "last_n_blocks", "finetune_last_n_blocks": 1}, {4, 5}),
        ({"finetune": "last_n_blocks", "finetune_last_n_blocks": 4}, {0, 1, 2, 3, 4, 5}),
        ({"finetune": "head"}, {5}),
    ],
)
def test_what_is_trained(changes: dict[str, Any], layers: set[int]) -> None:
    model = tiny(**changes)
    _, gradients = loss_and_gradients(model)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {model.layer_of(name) for name in gradients} == layers
    if changes["finetune"] == "head":
        assert gradients.keys() == {"aggregator.p"}


def test_layers_are_counted_from_the_embeddings_to_the_head() -> None:
    model = tiny(finetune="all")
    assert model.num_layers == 6
    found = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {found[f"backbone.{name}"] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert found["backbone.blocks.0.norm1.weight"] == 1
    assert found["backbone.blocks.3.ls2.gamma"] == 4
    assert found["backbone.norm.bias"] == found["aggregator.p"] == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"finetune": "head", "aggregator": "cls"}, "model.finetune head: the aggregator cls has no parameters"),
        ({"finetune": "all", "frozen_precision": "bf16"}, "model.frozen_precision bf16: no block is frozen"),
        ({"finetune_last_n_blocks": 5}, "model.finetune_last_n_blocks 5: the backbone has 4 blocks; use 0 to 4"),
    ],
)
def test_choices_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        tiny(**changes)
    assert len(str(caught.value).splitlines()) == 1


def test_drawn_weights_depend_on_seed_and_name_alone() -> None:
    """Not on the other parts of the network, on what is trained, or on a partition being taken of each module."""
    plain = tiny().state_dict()
    seen = []
    config = ModelConfig(backbone="tiny14", weights="random", finetune="all")
    other = build_model(config, seed=1, partition=lambda module: seen.extend(module.parameters(recurse=False)))
    assert {id(p) for p in other.parameters()} == {id(p) for p in seen}
    assert len(seen) == len(plain) - 1  # all but GeM's power
    assert all(torch.equal(plain[name], value) for name, value in other.state_dict().items())
    weight = plain["backbone.blocks.1.mlp.fc1.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(weight, plain["backbone.blocks.2.mlp.fc1.weight"])
    assert plain["backbone.blocks.1.mlp.fc1.bias"].abs().max() == 0
    assert plain["backbone.norm.weight"].unique().tolist() == [1]
    assert plain["aggregator.p"].tolist() == [3]


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_frozen_part_in_bf16_trains_the_rest_in_float32(aggregator: str) -> None:
    head = {"aggregator": aggregator, "aggregator_args": AGGREGATORS[aggregator]}
    whole, half = tiny(**head), tiny(**head, frozen_precision="bf16")
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == {
        name for name, p in half.named_parameters() if not p.requires_grad and not name.startswith("backbone.norm.")
    }
    half.load_state_dict(whole.state_dict())
    loss, gradients = loss_and_gradients(half)
    expected_loss, expected = loss_and_gradients(whole)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        if "widen" in name:  # of BoQ: a ReLU that rounding turns over changes a whole row
            assert (gradient - expected[name]).norm() < 0.15 * expected[name].norm()
            continue
        within = 0.05 * expected[name].abs().max().item() + 1e-4 * largest  # what should be 0 is rounding
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=within)
    half.float()  # as DeepSpeed casts all of it
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    half.cast_frozen()
    assert {name: p.dtype for name, p in half.named_parameters()} == kinds
    assert loss_and_gradients(half)[0] == loss


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_activation_checkpointing_changes_memory_alone(aggregator: str) -> None:
    """Trained blocks run twice in training, once otherwise; frozen ones always once."""
    model = tiny(aggregator=aggregator, aggregator_args=AGGREGATORS[aggregator]).train()
    plain = loss_and_gradients(model)
    runs = [0] * 4
    for index, block in enumerate(model.backbone.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
    model.activation_checkpointing = True
    again = loss_and_gradients(model)
    assert runs == [1, 1, 2, 2]
    loss_and_gradients(model.eval())
    assert runs == [2, 2, 3, 3]
    assert again[0] == plain[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in plain[1].items())


@pytest.mark.slow
def test_compiled_blocks_change_no_number_and_swallow_no_hook() -> None:
    """Through dynamo and autograd's graphs; tests/faults does so through inductor, too."""
    check_compiled_blocks("aot_eager")
