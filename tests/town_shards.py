"""The shards of the town that golden curves are of, and the recipe of these curves."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town
from tests.forked import scratch

STEPS = 30


def town_of_24() -> Path:
    """The shard set of 24 places with three views, rendered at the first call, by one process at a time."""
    place = scratch() / "town_of_24"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not (place / "shards" / "index.parquet").exists():
            render_town(place / "town", Town(seed=3, places=24, views=3, held_out_places=0), processes=1)
            write_shards(read_gsv_cities(place / "town" / "train", min_images_per_place=3), place / "shards")
    return place / "shards"


def wait_for_the_town() -> None:
    """Has rank 0 render the shard set; every rank calls this."""
    if dist.get_rank() == 0:
        town_of_24()
    dist.barrier()


def town_recipe(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe of `tests/golden/town.json`, with changes by section. It saves at the last step alone."""
    base: dict[str, dict[str, Any]] = {
        "data": {
            **{"places_per_batch": 8, "images_per_place": 3, "image_size": 42, "composition": "mixed"},
            **{"augment_ops": 1, "augment_magnitude": 4, "decode_threads": 0},
        },
        "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem", "finetune_last_n_blocks": 3},
        "memory": {"size": 100, "start_epoch": 1.5},
        "optim": {"lr": 1e-3, "warmup_steps": 5, "weight_decay": 0.05},
        "loss": {},
        "engine": {},
        "trainer": {"epochs": 99, "max_steps": STEPS, "validate_every_epochs": 0, "checkpoint_every_steps": STEPS},
        "tracking": {"enabled": False},
    }
    recipe = {section: values | changes.get(section, {}) for section, values in base.items()}
    if "shards" not in recipe["data"]:
        recipe["data"]["shards"] = str(town_of_24())
    return recipe
