"""ViT-S of three kinds under every aggregator, at full size: steps on two ranks, then re-ranked at two image sizes.

Descriptors are as long as published (SALAD 8,448 numbers, BoQ 12,288). Weights are random, so recalls say nothing here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from configs.schema import Recipe
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from eval.benchmarks.load import load_benchmarks
from eval.evaluate import evaluate
from model.network import build_model, meta_model
from tests.photos import write_gsv_cities, write_noise_benchmark
from tests.ranks import on_ranks, shared_folder
from trainer.checkpoint import load_model_weights
from trainer.checkpoint_folder import newest_valid

SIZES = {"vits14": (224, 322), "vits14_reg": (224, 322), "dinov3_vits16": (224, 320)}
STEPS = 3


def check_cls() -> None:
    under("cls")


def check_gem() -> None:
    under("gem")


def check_salad() -> None:
    under("salad")


def check_boq() -> None:
    under("boq")


def check_tokens() -> None:
    under("tokens")


def under(aggregator: str) -> None:
    """All three backbones, each at another ZeRO stage."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(6), 3)})
        write_shards(read_gsv_cities(folder / "native", min_images_per_place=3), folder / "shards")
        write_noise_benchmark(folder / "town")
    dist.barrier()
    for backbone, zero_stage in zip(SIZES, (1, 3, 2), strict=True):
        train_and_evaluate(folder, backbone, aggregator, zero_stage=zero_stage)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def train_and_evaluate(folder: Path, backbone: str, aggregator: str, *, zero_stage: int) -> None:
    from trainer.loop import train
    from trainer.process_group import Rank

    first, second = SIZES[backbone]
    output = folder / f"{backbone}-{aggregator}"
    sections: dict[str, dict[str, Any]] = {
        "data": {"shards": str(folder / "shards"), "places_per_batch": 2, "images_per_place": 2, "image_size": first},
        "model": {"backbone": backbone, "weights": "random", "aggregator": aggregator},
        "memory": {"size": 12, "start_epoch": 0},
        "engine": {"zero_stage": zero_stage},
        "trainer": {"max_steps": STEPS, "validate_every_epochs": 0},
        "eval": {"data_root": str(folder), "image_size": first, "pictures": 0, "batch_size": 4, "recall_at": [1, 5]},
        "tracking": {"enabled": False},
    }
    recipe = Recipe.model_validate({"output": str(output), **sections})
    train(recipe, Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), Console(quiet=True), resume=None)
    dist.barrier()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "train/loss" in line]) == STEPS
    model = build_model(recipe.model)
    checkpoint, _ = newest_valid(output / "checkpoints")
    assert checkpoint
    load_model_weights(model, checkpoint)
    (benchmark,) = load_benchmarks(["town"], folder)
    for side in (first, second):
        config = recipe.eval.model_copy(update={"image_size": side})
        result = evaluate(model.eval(), benchmark, config)
        assert result.reranked is not None
        assert result.predictions_QK.shape == (5, 7)  # all that there are
    size = meta_model(recipe.model).descriptor_size
    assert size == {"salad": 8448, "boq": 12288, "tokens": 3072}.get(aggregator, 384)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(output)
    dist.barrier()


test_on_ranks = on_ranks(__file__, (2,))
