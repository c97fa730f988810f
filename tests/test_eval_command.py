"""`rerankvpr eval` as a user types it: the list, results on disk, the sweep, MLflow, and one line for each mistake."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from eval.recall import Figure, Recall
from eval.result import Result
from launch.eval_tracking import Evaluation, log_evaluation
from tests import forked
from tests.networks import backbone
from tests.test_eval_features import write_photos

pytestmark = pytest.mark.slow


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return forked.run(folder, "rerankvpr", "eval", *argv, environment={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny ViT, and a manifest of a few photographs."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save_file(backbone("tiny14", "random").state_dict(), folder / "tiny.safetensors")
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


def test_results_are_printed_though_the_disk_is_full(place: Path, tiny_disk: Path) -> None:
    """Each file that found no room is named, and none of them is there in part."""
    with contextlib.suppress(OSError):
        (tiny_disk / "filler").write_bytes(b"x" * 2**20)
    flags = ("--weights", "tiny.safetensors", "--benchmarks", "manifest:mine.csv", "--image-size", "42", "--sweep")
    done = run(place, *flags, "--recall-at", "1", "--pictures", "1", "--out", str(tiny_disk / "out"))
    assert done.returncode == 2, done.stderr
    assert "re-ranked" in done.stdout
    lines = done.stderr.splitlines()
    for name in (
        "sweeps/mine.png",
        "pictures/mine",
        "results.json",
        "results.csv",
        "predictions.parquet",
        "report.html",
    ):
        assert any(f"{tiny_disk / 'out' / name} could not be written ([Errno 28] No space" in line for line in lines), (
            name
        )
    assert not [path for path in (tiny_disk / "out").rglob("*") if path.is_file() and path.stat().st_size]


def test_the_first_candidate_alone_is_drawn_alone(place: Path) -> None:
    flags = ("--weights", "tiny.safetensors", "--benchmarks", "manifest:mine.csv", "--image-size", "28", "--no-rerank")
    done = run(place, *flags, "--recall-at", "1", "--pictures", "2", "--out", "first")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (place / "first" / "pictures" / "mine").iterdir()] == ["retrieval.png"]


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
    artifacts = {file.path for file in client.list_artifacts(logged.info.run_id)}
    files = {"results.json", "results.csv", "predictions.parquet", "report.html"}
    assert artifacts == {*files, "pictures", "sweeps", "images"}
    assert logged.data.params["eval.image_size"] == "42"
    assert logged.data.metrics["eval/mine/rerank_s_per_query"] > 0
    assert logged.data.metrics["eval/mine/recall_1"] == pytest.approx(result["recall"]["1"])
    assert logged.info.status == "FINISHED"

    assert float(rows[0]["images_per_s"]) == pytest.approx(result["images_per_s"], rel=1e-3)
    assert {row["nn_match_thresh"] for row in rows} == {"", "0.65"}
    assert result["rerank"]["top_k"] == 30
    assert result["rerank_rule"] in {row["rerank"] for row in rows}
    assert "re-ranked: top 30 at most (auto), value of block -2, all patches, match > 0.65" in done.stdout
    for words in (("out",), ("manifest:mine.csv", "--model", "tiny.safetensors", "--image-size", "42")):
        drawn = forked.run(place, "rerankvpr", "show", "sweep", *words, "--out", "swept.png")
        assert drawn.returncode == 0, drawn.stderr
        assert "mine: R@1 " in drawn.stdout
        assert (place / "swept.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--benchmarks", "manifest:mine.csv", "--recall-at", "1", "30"), "recall_at 30: mine has 9 database images"),
        (("--benchmarks", "manifest:nobody.csv"), "none of 1 queries has a positive"),
        (("--benchmarks", "eynsham"), "none of its layouts; expected images/test/{database,queries}"),
        (("--benchmarks", "eynsam"), "unknown benchmark 'eynsam'; nearest: eynsham"),
        (("--benchmarks", "tokyo247"), "no folder tokyo247 in the data root data"),
        (("--benchmarks", "manifest:mine.csv", "--faiss-index", "Nonsense"), "eval.faiss_index 'Nonsense'"),
        (("--benchmarks", "manifest:mine.csv", "--sweep", "True", "--rerank.enabled", "False"), "--sweep needs"),
    ],
)
def test_mistakes_get_one_line(place: Path, flags: tuple[str, ...], said: str) -> None:
    done = run(place, "--weights", "tiny.safetensors", "--image-size", "42", "--recall-at", "1", *flags)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("rerankvpr: ")]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]


def _result() -> Result:
    ranked = np.array([[0, 1], [1, 0]])
    return Result(
        name="mine: all",
        protocol="same place",
        num_database=2,
        num_queries=2,
        num_without_positive=0,
        image_size=42,
        precision="fp32",
        pixels="42 px square, bilinear",
        retrieved=Recall({1: Figure(50.0)}),
        reranked=Recall({1: Figure(100.0)}),
        timings={"rerank_s_per_query": 0.25},
        predictions_QK=ranked,
        reranked_QK=ranked,
        gain=Recall({1: Figure(50.0, (0.0, 100.0))}),
    )


def test_a_run_hangs_under_the_trainings_where_the_store_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SQLite store: nested in the training's experiment, or alone; recalls, timings, results and pictures."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/pictures/mine").mkdir(parents=True)
    (tmp_path / "out/pictures/mine/matches.png").write_bytes(b"picture")
    client = MlflowClient(tracking_uri="sqlite:///child.db")
    parent = client.create_run(client.create_experiment("of the training")).info.run_id
    console = Console(record=True, width=200)
    runs = [
        log_evaluation(
            "sqlite:///child.db",
            "evaluations",
            Evaluation("step-00000007", {"eval.image_size": 42}, [_result()], tmp_path / "out"),
            parent=of,
            console=console,
        )
        for of in (parent, None, "0123456789abcdef0123456789abcdef")
    ]
    assert all(runs)
    nested, alone, elsewhere = (client.get_run(str(run)) for run in runs)
    assert nested.data.tags["mlflow.parentRunId"] == parent
    assert nested.info.experiment_id == client.get_run(parent).info.experiment_id
    for run in (alone, elsewhere):
        assert "mlflow.parentRunId" not in run.data.tags
        assert client.get_experiment(run.info.experiment_id).name == "evaluations"
    assert "the training's run is not in this store" in console.export_text()
    assert nested.data.params == {"model": "step-00000007", "eval.image_size": "42"}
    assert nested.data.metrics == {
        "eval/mine: all/recall_1": 50.0,
        "eval/mine: all/reranked_recall_1": 100.0,
        "eval/mine: all/gain_1": 50.0,
        "eval/mine: all/rerank_s_per_query": 0.25,
        "eval/mine: all/mb_per_image": 0.0,
        "eval/recall_1": 50.0,
        "eval/reranked_recall_1": 100.0,
    }
    assert {file.path for file in client.list_artifacts(str(runs[0]))} == {"pictures", "results.csv", "results.json"}
    assert [f.path for f in client.list_artifacts(str(runs[0]), "pictures/mine")] == ["pictures/mine/matches.png"]
    assert nested.info.status == "FINISHED"


def test_a_store_that_fails_is_one_line_and_no_end() -> None:
    console = Console(record=True, width=300)
    for uri in ("http://127.0.0.1:9", "nonsense://nowhere"):
        evaluation = Evaluation("m", {}, [_result()], None)
        assert log_evaluation(uri, "x", evaluation, parent=None, console=console) is None
    assert console.export_text().count("MLflow does not answer (") == 2
