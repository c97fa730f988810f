"""Descriptors as long as SALAD's and BoQ's are at ViT-B, 8,448 and 12,288 numbers, everywhere that one goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rerankvpr
from configs.registry import BACKBONES
from configs.schema import LossConfig, MemoryConfig, Recipe
from eval.benchmarks.load import load_benchmarks
from eval.evaluate import evaluate
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.photo_list import list_source
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue
from tests.checkpoints import write_checkpoint
from tests.photos import write_noise_benchmark
from tests.test_plugin_records import forget
from trainer.export import export_network
from trainer.logged_model import save_pyfunc
from trainer.memory_plan import plan_memory
from trainer.parameter_sizes import parameter_sizes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_process")]

SIDE = 126  # 9 x 9 patches: SALAD needs more than its 64 clusters


@pytest.fixture(scope="module", params=[("salad", 8448), ("boq", 12288)], ids=["salad", "boq"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, single_process: None
) -> Iterator[tuple[Path, Recipe, int]]:
    """A folder with a run of ViT-B's sizes but one block, and a benchmark of noise; the recipe; D."""
    aggregator, size = request.param
    BACKBONES.register("shallow_b14", replace(BACKBONES.get("vitb14"), depth=1))
    folder = tmp_path_factory.mktemp("long")
    write_noise_benchmark(folder / "town")
    recipe = Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": {"backbone": "shallow_b14", "weights": "random", "aggregator": aggregator, "finetune": "head"},
            "data": {"image_size": SIDE},
            "memory": {"size": 1000},
            "eval": {"image_size": SIDE, "batch_size": 4, "recall_at": [1], "rerank": {"layer": -1, "top_k": 3}},
        }
    )
    write_checkpoint(folder / "run", recipe)
    yield folder, recipe, size
    BACKBONES.forget("shallow_b14")
    forget()


def test_in_a_queue_its_plan_and_a_loss(made: tuple[Path, Recipe, int]) -> None:
    _, recipe, size = made
    queue = MemoryQueue(6, size)
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(4, size, generator=generator), dim=1).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1])
    queue.enqueue(F.normalize(torch.randn(6, size, generator=generator), dim=1), torch.tensor([0, 1, 2, 2, 3, 3]), 0)
    loss = GlobalLoss(LossConfig(), MemoryConfig(size=6))(rows, ids, queue, step=1).loss
    loss.backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert rows.grad.abs().max() > 0
    sizes = parameter_sizes(recipe)
    assert sizes.descriptor == size
    (part,) = [part for part in plan_memory(recipe, sizes=sizes, ranks=1, on_cpu=True).parts if part.name == "queue"]
    assert part.device == 1000 * (4 * size + 16)


def test_in_a_search_an_index_and_an_evaluation(made: tuple[Path, Recipe, int]) -> None:
    folder, _, size = made
    describer = rerankvpr.load(folder / "run", device="cpu")
    (benchmark,) = load_benchmarks(["town"], folder)
    result = evaluate(describer.model, benchmark, describer.config)
    assert result.reranked_QK is not None
    build_index(describer, list_source("town", folder), folder / "index", factory="IVF2,Flat", params="nprobe=2")
    index = Index.open(folder / "index", device="cpu")
    assert index.features.descriptors().shape == (7, size)
    places = index.locate(benchmark.queries, top_k=3)
    assert [[one.number for one in place.candidates] for place in places] == result.reranked_QK[:, :3].tolist()


def test_in_exports_and_in_mlflow(made: tuple[Path, Recipe, int]) -> None:
    folder, recipe, size = made
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    expected = rerankvpr.load(folder / "run", device="cpu").describe(images)
    assert expected.shape == (2, size)
    exported = export_network(folder / "run" / "checkpoints" / "step-00000001", folder / "net.safetensors")
    assert np.array_equal(rerankvpr.load(exported.file, device="cpu").describe(images), expected)
    save_pyfunc(exported.file, recipe, folder / "model", "run", "m-1")
    model = mlflow.pyfunc.load_model(str(folder / "model"))
    np.testing.assert_allclose(model.predict(images), expected, atol=1e-6)
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, size)
    assert model.metadata.metadata["descriptor_size"] == size
