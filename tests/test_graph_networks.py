"""Every network that can be trained becomes a graph: a batch of any size, and its constants folded."""

from __future__ import annotations

import pytest
import torch

from configs.schema import Recipe
from data_pipeline.images import _mean_and_std
from model.network import build_model
from trainer.graph import ImagesToDescriptors, export_program


@pytest.mark.parametrize(
    ("backbone", "aggregator", "grid"), [("tiny14", "boq", 6), ("tiny14", "tokens", 6), ("tiny16", "cls", 5)]
)
@pytest.mark.slow
def test_a_graph_is_the_network(backbone: str, aggregator: str, grid: int) -> None:
    """To rounding; positions and rotations are constants."""
    recipe = Recipe.model_validate({"model": {"backbone": backbone, "weights": "random", "aggregator": aggregator}})
    network = build_model(recipe.model).eval().requires_grad_(False)
    size = (grid * network.spec.patch, (grid + 1) * network.spec.patch)
    program = export_program(ImagesToDescriptors(network, "float"), size)
    folded = {"upsample", "sin", "cos", "_upsample"} & {
        str(node.target).removeprefix("aten.").split("_")[0].split(".")[0] for node in program.graph.nodes
    }
    assert not folded
    for count in (1, 4):
        images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            torch.testing.assert_close(program.module()(images), network(images), rtol=0, atol=1e-6)


def test_the_first_thing_that_a_process_does_may_be_an_export() -> None:
    """What normalisation keeps between calls is made before the trace."""
    _mean_and_std.cache_clear()
    network = build_model(Recipe.model_validate({"model": {"backbone": "tiny14", "weights": "random"}}).model)
    module = ImagesToDescriptors(network.eval().requires_grad_(False), "uint8")
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(export_program(module, (28, 28)).module()(images), module(images), rtol=0, atol=1e-5)
