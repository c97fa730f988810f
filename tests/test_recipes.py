"""The recipes of published methods: planned as they are, and ten real steps of each at a small size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from configs.load import RECIPES, load_recipe
from configs.schema import Recipe
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from launch.plan_command import main as plan
from tests.photos import write_gsv_cities

PUBLISHED = ("gsv_cities_vitb_salad", "gsv_cities_vitb_boq", "map_finetune")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_what_was_run(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text().partition("\nname:")[0]
    assert "Not run by us at this size." in head.replace("\n# ", " ")


@pytest.mark.parametrize(
    ("name", "ranks"), [("gsv_cities_vitb_salad", 4), ("gsv_cities_vitb_boq", 8), ("map_finetune", 1)]
)
def test_it_is_planned_for_gpus(name: str, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", str(ranks), "--device-gb", "80", "--tflops", "400", "--data.shards", str(tmp_path / "none")]
    assert plan([name, *flags, "--json", str(tmp_path / "plan.json")]) == 0
    assert f"{ranks} rank(s) on GPU" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["device_bytes"] < 40e9


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_ten_steps_at_a_small_size(name: str, tmp_path: Path, single_process: None) -> None:
    from trainer.loop import train
    from trainer.process_group import Rank

    write_gsv_cities(tmp_path / "native", {"Aachen": dict.fromkeys(range(12), 4)})
    write_shards(read_gsv_cities(tmp_path / "native"), tmp_path / "shards")
    content = load_recipe(Path(name)).model_dump(mode="json")
    small: dict[str, dict[str, Any]] = {
        "data": {"shards": str(tmp_path / "shards"), "places_per_batch": 4, "image_size": 126, "decode_threads": 0},
        "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
        "engine": {"precision": "fp32"},
        "optim": {"warmup_steps": min(5, content["optim"]["warmup_steps"])},
        "trainer": {"max_steps": 10, "epochs": 40, "validate_every_epochs": 0, "log_every_steps": 1},
        "eval": {"benchmarks": [], "image_size": 126},
        "tracking": {"enabled": False},
    }
    for section, values in small.items():
        content[section] |= values
    recipe = Recipe.model_validate({**content, "output": str(tmp_path / "run")})
    summary = train(recipe, Rank(0, 1, torch.device("cpu")), Console(quiet=True), resume=None)
    assert summary.steps == 10
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)
