"""The recipes of published methods, planned as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import RECIPES
from launch.plan_command import main as plan

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
