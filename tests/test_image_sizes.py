"""Sizes that are no squares: read, decoded, trained on, planned and evaluated as height and width."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from configs.flags import FlagError, parse_flags
from configs.image_size import height_width, num_pixels, shown_size
from configs.schema import DataConfig, EvalConfig, Recipe
from data_pipeline.images import decode
from eval.pixels import input_size, load_image, pixel_differences, pixel_rule
from launch.cli import main
from tests.photos import jpeg
from tests.training import finish, logged, warm_ranks
from trainer.flops import model_flops

SIZE = (28, 42)
FLAGS = ("--data.image-size", "28", "42", "--eval.image-size", "28", "42")


@pytest.mark.parametrize(
    ("given", "size"), [(224, 224), ([322, 434], (322, 434)), ((322, 322), 322), ("224", 224), (["28", "42"], (28, 42))]
)
def test_a_size_has_one_form(given: Any, size: object) -> None:
    assert DataConfig(image_size=given).image_size == EvalConfig(image_size=given).image_size == size
    assert DataConfig.model_validate_json(DataConfig(image_size=given).model_dump_json()).image_size == size


@pytest.mark.parametrize("given", [[322], [1, 2, 3], 0, [0, 14], -14, 1.5, "x", None, True, {}, float("inf")])
def test_what_is_no_size_is_one_line(given: Any) -> None:
    with pytest.raises(ValidationError, match="neither a side in pixels, nor height and width such as") as error:
        DataConfig(image_size=given)
    assert error.value.error_count() == 1


def test_flags_take_one_number_or_two() -> None:
    assert parse_flags(DataConfig, ["--image-size", "322", "434"], prog="p").image_size == (322, 434)
    assert parse_flags(DataConfig, ["--image-size", "224", "--cache-gb", "1"], prog="p").image_size == 224
    with pytest.raises(FlagError, match="is neither a side in pixels"):
        parse_flags(DataConfig, ["--image-size", "322x434"], prog="p")


def test_both_sides_are_multiples_of_the_patch() -> None:
    with pytest.raises(ValidationError, match=r"data\.image_size: 430 is not a multiple .* nearest: 420 or 434"):
        Recipe.model_validate({"data": {"image_size": [322, 430]}})


def test_sizes_count_and_show_themselves() -> None:
    assert (height_width(224), height_width((322, 434))) == ((224, 224), (322, 434))
    assert (num_pixels(224), num_pixels((322, 434))) == (224**2, 322 * 434)
    assert (shown_size(224), shown_size((322, 434))) == ("224", "322x434")


def test_an_evaluation_resizes_by_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data := jpeg(np.random.default_rng(0)))
    config = EvalConfig(image_size=SIZE)
    assert torch.equal(load_image(tmp_path / "a.jpg", config, 14), decode(data, SIZE))
    assert pixel_rule(config) == "28x42 px, bilinear"
    assert pixel_rule(EvalConfig(image_size=SIZE, resize="aspect")) == "area of 28x42 px, bilinear"
    assert input_size(300, 400, EvalConfig(image_size=(224, 322), resize="aspect"), 14) == (238, 308)
    assert pixel_differences(config, DataConfig(image_size=SIZE)) == ""
    assert pixel_differences(config, DataConfig()) == "eval.image_size is 28x42, trained with 224"


def test_a_plan_counts_what_it_takes() -> None:
    wide, square = (
        Recipe.model_validate({"data": {"image_size": size}, "model": {"weights": "random"}})
        for size in ([112, 448], 224)  # as many patches
    )
    assert model_flops(wide) == model_flops(square)
    assert wide.model.spec.num_tokens((112, 448)) == square.model.spec.num_tokens(224)
    assert wide.model.spec.num_tokens((112, 224)) == 1 + 8 * 16


@pytest.mark.slow
def test_training_at_a_size_that_is_no_square_is_the_same_on_one_and_two_ranks(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 1e-4, gradient norms within 1e-3: float32 sums in another order, amplified by eight steps of Adam."""
    flags = (*FLAGS, "--tracking.enabled", "False", "--trainer.epochs", "2")
    folders = []
    for world in (1, 2):
        finish(warm_ranks(workplace, f"wide-{world}", *flags, world_size=world))
        folders.append(workplace / f"wide-{world}")
    one, two = map(logged, folders)
    assert one.keys() == two.keys()
    assert len(one) == 8
    for step in one:
        assert one[step]["train/loss"] == pytest.approx(two[step]["train/loss"], rel=1e-4)
        assert one[step]["train/grad_norm"] == pytest.approx(two[step]["train/grad_norm"], rel=1e-3)
    results = [json.loads((folder / "results.json").read_text())["results"][0] for folder in folders]
    assert results[0]["image_size"] == list(SIZE)
    assert results[0]["pixels"] == "28x42 px, bilinear"
    assert results[0]["recall"] == results[1]["recall"]
    capsys.readouterr()
    assert (
        main(["eval", "--checkpoint", str(folders[0]), "--pictures", "0", "--bootstrap", "0", "--recall-at", "1"]) == 0
    )
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "28x42 px" in printed
    assert "trained with" not in printed
