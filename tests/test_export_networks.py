"""Networks of every kind, as `rerankvpr export` writes them for onnxruntime and torch.export, and as these run them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import rerankvpr
from configs.schema import Recipe
from launch.export_command import main as export
from tests.checkpoints import write_checkpoint
from tests.networks import AGGREGATORS
from tests.test_eval_gardens import photographs
from trainer.graph import run_graph

pytestmark = pytest.mark.slow

NETWORKS = [("tiny14", "salad"), ("tiny14", "boq"), ("tiny14", "tokens"), ("tiny16", "gem"), ("tiny16", "tokens")]
BATCHES = (1, 2, 5)


def check(run: Path, side: int, folder: Path, suffix: str) -> None:
    """Cosines with the engine's own descriptors, for batches of several sizes; the graph's answer is each image's."""
    images = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    expected = rerankvpr.load(run, device="cpu").describe(images)
    assert export([str(run), str(folder / f"net{suffix}"), "--image-size", str(side)]) == 0
    for count in BATCHES:
        found = run_graph(folder / f"net{suffix}", images[:count]).numpy()
        assert found.shape == (count, expected.shape[1])
        assert (found * expected[:count]).sum(axis=1).min() > 1 - 1e-4
        np.testing.assert_allclose(found, expected[:count], atol=5e-6)  # float32 in another order


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(("backbone", "aggregator"), NETWORKS)
def test_a_graph_gives_the_engines_descriptors(backbone: str, aggregator: str, suffix: str, tmp_path: Path) -> None:
    side = {"tiny14": 56, "tiny16": 48}[backbone]
    model = {"backbone": backbone, "weights": "random", "aggregator": aggregator}
    sizes = {"data": {"image_size": side}, "eval": {"image_size": side}}
    recipe = Recipe.model_validate({"model": model | {"aggregator_args": AGGREGATORS[aggregator]}, **sizes})
    write_checkpoint(tmp_path / "run", recipe)
    check(tmp_path / "run", side, tmp_path, suffix)


@photographs
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_graph_of_real_weights_gives_the_engines_descriptors(suffix: str, tmp_path: Path) -> None:
    """At another size than that of the position table's training."""
    weights = str(Path(os.environ["RERANKVPR_TEST_WEIGHTS"]).resolve())
    recipe = Recipe.model_validate({"model": {"backbone": "vits14", "weights": weights}})
    write_checkpoint(tmp_path / "run", recipe)
    check(tmp_path / "run", 224, tmp_path, suffix)
