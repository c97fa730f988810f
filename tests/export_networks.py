"""Graphs that `rerankvpr export` writes, held against the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import rerankvpr
from configs.schema import Recipe
from launch.export_command import main as export
from tests.checkpoints import write_checkpoint
from tests.networks import AGGREGATORS
from trainer.graph import load_graph

SIDES = {"tiny14": 56, "tiny16": 48}
BATCHES = (1, 2, 5)


def check_tiny(folder: Path, backbone: str, aggregator: str, suffix: str) -> None:
    """Of a network of one backbone and aggregator."""
    side = SIDES[backbone]
    model = {"backbone": backbone, "weights": "random", "aggregator": aggregator}
    sizes = {"data": {"image_size": side}, "eval": {"image_size": side}}
    recipe = Recipe.model_validate({"model": model | {"aggregator_args": AGGREGATORS[aggregator]}, **sizes})
    write_checkpoint(folder / "run", recipe)
    check_graph(folder / "run", side, folder / f"net{suffix}")


def check_graph(run: Path, side: int, out: Path) -> None:
    """Exports a run; batches of several sizes have the engine's own descriptors, image by image."""
    images = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    expected = rerankvpr.load(run, device="cpu").describe(images)
    assert export([str(run), str(out), "--image-size", str(side)]) == 0
    graph = load_graph(out)
    for count in BATCHES:
        found = graph(images[:count]).numpy()
        assert found.shape == (count, expected.shape[1])
        assert (found * expected[:count]).sum(axis=1).min() > 1 - 1e-4
        np.testing.assert_allclose(found, expected[:count], atol=5e-6)  # float32 in another order
