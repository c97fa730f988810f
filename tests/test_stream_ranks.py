"""Trainings that read whole tars: the losses of one rank on two and four, and after a resume inside an epoch.

`tests/golden/stream.json` holds loss and gradient norm of each step; RERANKVPR_WRITE_GOLDEN=1 writes it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from configs.schema import Recipe
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.photos import write_gsv_cities
from tests.ranks import on_ranks, shared_folder

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "stream.json"
PILLOW = int(PIL.__version__.partition(".")[0])
STEPS, STOPPED_AT = 8, 3  # an epoch has five


def curve(folder: Path, name: str, *, max_steps: int, resume: bool = False, **data: Any) -> list[list[float]]:
    """Loss and gradient norm by step of a training in this process group."""
    from trainer.loop import train
    from trainer.process_group import Rank
    from trainer.resume import Resume

    recipe = Recipe.model_validate(
        {
            "output": str(folder / name),
            "data": {
                **{"shards": str(folder / "shards"), "places_per_batch": 8, "images_per_place": 3, "image_size": 28},
                **{"composition": "mixed", "decode_threads": 1, "access": "stream", "stream_buffer_places": 24},
                **data,
            },
            "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
            "memory": {"size": 50, "start_epoch": 0},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "trainer": {"epochs": 99, "max_steps": max_steps, "validate_every_epochs": 0},
            "tracking": {"enabled": False},
        }
    )
    rank = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    train(recipe, rank, Console(quiet=True), resume=Resume() if resume else None)
    dist.barrier()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [[line["train/loss"], line["train/grad_norm"]] for line in lines if "train/loss" in line]


def check_streams_give_golden_losses_on_any_ranks_and_after_a_resume() -> None:
    """Tolerance: float32 sums in another order, amplified by Adam; another order of data is off by far more."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        write_gsv_cities(
            folder / "native", {"Aachen": dict.fromkeys(range(25), 4), "Bergen": dict.fromkeys(range(18), 5)}
        )
        write_shards(read_gsv_cities(folder / "native"), folder / "shards", ShardOptions(shard_bytes=20_000))
    dist.barrier()
    straight = curve(folder, "straight", max_steps=STEPS)
    curve(folder, "stopped", max_steps=STOPPED_AT)
    resumed = curve(folder, "stopped", max_steps=STEPS, resume=True)
    assert resumed == straight  # bitwise, the layout being equal
    if os.environ.get("RERANKVPR_WRITE_GOLDEN") and dist.get_world_size() == 1:
        GOLDEN.write_text(json.dumps(straight, indent=1) + "\n")
    # Pillow before 13, which Python 3.10 has, writes other noise
    golden = json.loads(GOLDEN.read_text()) if PILLOW >= 13 else straight
    assert len(straight) == len(golden) == STEPS
    for step, (found, expected) in enumerate(zip(straight, golden, strict=True)):
        assert found == pytest.approx(expected, rel=2e-3), f"{dist.get_world_size()} ranks, step {step}"
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


test_on_ranks = on_ranks(__file__)
