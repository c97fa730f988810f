"""`rerankvpr eval` as a user types it: the list, results on disk, the sweep, MLflow, and one line for each mistake."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.load import recipe_text
from configs.schema import ModelConfig, Recipe
from model.backbone import build_backbone
from tests.ranks import ROOT
from tests.test_eval_features import write_photos


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    command = [sys.executable, "-m", "rerankvpr", "eval", *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny ViT, and a manifest of a few photographs."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save_file(build_backbone("tiny14", "random").state_dict(), folder / "tiny.safetensors")
    write_photos(folder / "data/photos", 12)
    rows = [f"photos/{i:03d}.jpg,{'database' if i < 9 else 'query'},{i % 9}" for i in range(12)]
    (folder / "data/mine.csv").write_text("\n".join(["path,role,place", *rows, "photos/000.jpg,query,none"]))
    (folder / "data/nobody.csv").write_text("path,role,place\nphotos/000.jpg,database,1\nphotos/001.jpg,query,2\n")
    (folder / "data/eynsham").mkdir()
    return folder


def test_list_needs_no_weights(place: Path) -> None:
    done = run(place, "--list")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("msls_val", "tokyo247", "nordland", "eynsham", "manifest:FILE"))


def test_results_table_csv_sweep_and_tracking(place: Path) -> None:
    flags = ("--weights", "tiny.safetensors", "--benchmarks", "manifest:mine.csv", "--image-size", "42")
    more = ("--recall-at", "1", "3", "--out", "out", "--sweep", "--rerank.saliency-thresh", "None")
    done = run(place, *flags, *more, "--track", "sqlite:///mlflow.db", "--pictures", "3", "--rerank.when", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 4 queries have no positive" in done.stdout
    assert "saliency \\ match" in done.stdout
    (result,) = json.loads((place / "out/results.json").read_text())["results"]
    assert result["protocol"] == "same place, all queries"
    assert result["recall_interval"]["1"][0] <= result["recall"]["1"] <= result["recall_interval"]["1"][1]
    assert result["gain"]["3"][0] == pytest.approx(result["recall_reranked"]["3"] - result["recall"]["3"])
    assert any("auto: margins" in note for note in result["notes"])
    rows = list(csv.DictReader((place / "out/results.csv").open()))
    assert {(row["stage"], row["k"]) for row in rows} == {
        (s, k) for s in ("retrieved", "re-ranked", "gain") for k in "13"
    }
    assert {path.name for path in (place / "out").rglob("*.png")} == {"mine.png", "retrieval.png", "matches.png"}
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rerankvpr")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["eval/mine/recall_1"] == pytest.approx(result["recall"]["1"])
    assert logged.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--benchmarks", "manifest:mine.csv", "--recall-at", "1", "30"), "recall_at 30: mine has 9 database images"),
        (("--benchmarks", "manifest:nobody.csv"), "none of 1 queries has a positive"),
        (("--benchmarks", "eynsham"), "none of its layouts; expected images/test/{database,queries}"),
        (("--benchmarks", "eynsam"), "unknown benchmark 'eynsam'; nearest: eynsham"),
        (("--benchmarks", "tokyo247"), "no folder tokyo247 in the data root data"),
        (("--benchmarks", "manifest:mine.csv", "--index", "Nonsense"), "eval.index 'Nonsense'"),
        (("--benchmarks", "manifest:mine.csv", "--sweep", "True", "--rerank.enabled", "False"), "--sweep needs"),
    ],
)
def test_mistakes_get_one_line(place: Path, flags: tuple[str, ...], said: str) -> None:
    done = run(place, "--weights", "tiny.safetensors", "--image-size", "42", "--recall-at", "1", *flags)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("rerankvpr: ")]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]


def test_a_child_run_hangs_under_the_trainings(place: Path) -> None:
    """The run id of a checkpoint's state becomes the parent of the evaluation's run."""
    from mlflow import MlflowClient

    from launch.eval_command import EvalCommand, log_to_mlflow

    uri = f"sqlite:///{place / 'child.db'}"
    client = MlflowClient(tracking_uri=uri)
    parent = client.create_run(client.create_experiment("rerankvpr")).info.run_id
    checkpoint = place / "step"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"mlflow_run_id": parent}))
    recipe = Recipe(model=ModelConfig(backbone="tiny14", weights="random"))
    (checkpoint / "recipe.yaml").write_text(recipe_text(recipe))
    log_to_mlflow(EvalCommand(track=uri), checkpoint, recipe, [])
    experiment = client.get_experiment_by_name("rerankvpr")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs if run.info.run_id != parent] == [parent]
