"""Ten real steps of each recipe of a published method, at a small size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_recipe
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.curves import curve
from tests.photos import write_gsv_cities
from tests.ranks import on_ranks, shared_folder
from tests.test_recipes import PUBLISHED

pytestmark = pytest.mark.slow


def ten_steps(name: str, folder: Path) -> None:
    """Trains a recipe, made small."""
    content = load_recipe(Path(name)).model_dump(mode="json")
    small: dict[str, dict[str, Any]] = {
        "data": {"shards": str(folder / "shards"), "places_per_batch": 4, "image_size": 126, "decode_threads": 0},
        "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
        "engine": {"precision": "fp32"},
        "optim": {"warmup_steps": min(5, content["optim"]["warmup_steps"])},
        "trainer": {"max_steps": 10, "epochs": 40, "validate_every_epochs": 0, "log_every_steps": 1},
        "eval": {"benchmarks": [], "image_size": 126},
        "tracking": {"enabled": False},
    }
    for section, values in small.items():
        content[section] |= values
    del content["output"]
    losses = [loss for loss, _ in curve(folder, name, content)]
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)


def check_ten_steps_at_a_small_size() -> None:
    folder = shared_folder()
    write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(12), 4)})
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    for name in PUBLISHED:
        ten_steps(name, folder)


test_on_ranks = on_ranks(__file__, world_sizes=(1,))
