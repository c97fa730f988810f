"""From a folder of phone photographs to a trained and evaluated network, on one and two ranks, by commands alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.index import read_index
from data_pipeline.town.phone import Odd, Walk, photograph_town
from launch.cli import main
from tests import forked
from tests.training import ForkedRanks, finish

SMALL = (
    *("--model.backbone", "tiny14", "--model.weights", "random", "--data.image-size", "28", "--eval.image-size", "28"),
    *("--trainer.max-steps", "4", "--trainer.validate-every-epochs", "1", "--eval.pictures", "0"),
    *("--tracking.enabled", "False"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A walk of 45 photographs, some turned, WebP, PNG of 16 bits, one of 12 megapixels; and its shard set."""
    folder = tmp_path_factory.mktemp("own")
    photograph_town(folder / "photographs", Walk(places=9, views=5, error_m=1.0, odd=Odd(4, 2, 1)))
    arguments = ["--convert", "--cell-m", "20", "--min-images-per-place", "2", "--max-side", "320", "--threads", "1"]
    assert main(["shard", "photos", str(folder / "photographs"), str(folder / "set"), *arguments]) == 0
    return folder


def _train(folder: Path, world_size: int) -> dict[str, Any]:
    arguments = ["mine", "--data.shards", "set", "--output", f"run-{world_size}", *SMALL]
    finish(ForkedRanks(folder, world_size, "trainer", *arguments))
    return dict(json.loads((folder / f"run-{world_size}" / "results.json").read_text()))


@pytest.mark.slow
def test_phone_photographs_are_trained_on_and_evaluated(folder: Path) -> None:
    places = read_index(folder / "set").num_places
    one, two = (_train(folder, world_size) for world_size in (1, 2))
    for results in (one, two):
        (result,) = results["results"]
        assert (result["name"], result["num_queries"]) == ("held_out", round(0.2 * places))
        assert result["num_without_positive"] == 0
    assert one["before"][0]["recall"] == two["before"][0]["recall"]
    (table,) = (folder / "run-1").glob("held_out-*/held_out.csv")
    (other,) = (folder / "run-2").glob("held_out-*/held_out.csv")
    assert table.read_bytes() == other.read_bytes()
    assert table.parent.name == other.parent.name
    evaluate = ("rerankvpr", "eval", "--checkpoint", "run-1", "--bootstrap", "0", "--pictures", "0", "--recall-at", "1")
    labelled = forked.run(folder, *evaluate, "--benchmarks", f"manifest:{table}", "--out", "labelled")
    assert labelled.returncode == 0, labelled.stderr
    with table.open(newline="") as file:
        (folder / "plain.csv").write_text(
            "\n".join(["path,role", *(f"{table.parent / row['path']},{row['role']}" for row in csv.DictReader(file))])
        )
    plain = forked.run(folder, *evaluate, "--benchmarks", "manifest:plain.csv", "--out", "plain")
    assert plain.returncode == 0, plain.stderr
    assert (folder / "plain").is_dir()
