"""Tracking against real stores: an MLflow server that is killed and comes back, a full disk, a killed training."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import rerankvpr
from configs.load import recipe_text
from data_pipeline.images import normalise
from launch.sync_command import main as sync
from tests import forked
from tests.checkpoints import write_checkpoint
from tests.mlflow_server import (
    Server,
    recipe_for,
    runs_of,
    steps_of,
    track,
    training_that_never_ends,
    wait_until,
)
from trainer import tracking
from trainer.metrics_log import read_records
from trainer.mlflow_sender import Sender, read_state

pytestmark = pytest.mark.slow

BLOCKED_S = 0.1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines leave and failed calls are repeated sooner than in a training."""
    monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.1)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_a_training_goes_on_where_its_disk_is_full_from_the_start(tiny_disk: Path, server: Server) -> None:
    filler = tiny_disk / "filler"
    with contextlib.suppress(OSError):
        filler.write_bytes(b"x" * 2**20)
    said = io.StringIO()
    recipe = recipe_for(server.uri, tiny_disk / "run")
    tracker = track(recipe, said)
    for step in range(5):
        tracker.metrics({"train/loss": 1.0}, step)
    tracker.flush()
    filler.unlink()
    tracker.metrics({"train/loss": 1.0}, 5)
    tracker.close("FINISHED")
    assert steps_of(MlflowClient(server.uri), tracker.run_id) == list(range(6))
    assert said.getvalue().count("metrics wait in memory") == 1
    assert said.getvalue().count("takes lines again") == 1


def test_what_a_full_disk_never_took_is_in_mlflow_all_the_same(tiny_disk: Path, server: Server) -> None:
    said = io.StringIO()
    tracker = track(recipe_for(server.uri, tiny_disk / "run"), said)
    wait_until(lambda: tracker.run_id)
    with contextlib.suppress(OSError):
        (tiny_disk / "filler").write_bytes(b"x" * 2**20)
    for step in range(300):  # the file's last page has room for some
        tracker.metrics({"train/loss": 1.0}, step)
    tracker.evaluation("town", 300, {"protocol": "25 m"}, {"recall_1": 50.0})
    tracker.close("FINISHED")
    assert "lines are not in it, MLflow has them" in said.getvalue()
    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert steps_of(client, tracker.run_id) == list(range(300))
    (child,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    assert (child.info.status, child.data.metrics) == ("FINISHED", {"eval/recall_1": 50.0, "eval/town/recall_1": 50.0})


def test_a_clock_that_is_set_back_leaves_no_run_open(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a training, and between two starts of it."""
    recipe, now_ns = recipe_for(server.uri, tmp_path / "run"), time.time_ns
    for hours, status in ((0, "KILLED"), (-1, "FAILED"), (-3, "FINISHED")):
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: now_ns() + hours * 3600 * 10**9)
        tracker = track(recipe)
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: now_ns() + (hours - 1) * 3600 * 10**9)
        tracker.metrics({"train/loss": 1.0}, 1)
        tracker.close(status)
        assert MlflowClient(server.uri).get_run(tracker.run_id).info.status == status
    times = [record["time_ms"] for _, _, record in read_records(recipe.output / "metrics.jsonl") if record]
    assert times == sorted(times)


def test_a_killed_server_costs_two_trainings_neither_time_nor_a_metric(server: Server, tmp_path: Path) -> None:
    said = {name: io.StringIO() for name in ("one", "two")}
    recipes = {name: recipe_for(server.uri, tmp_path / name, system_metrics_every_s=0.3) for name in said}
    trackers = {name: track(recipe, said[name]) for name, recipe in recipes.items()}
    slowest = 0.0

    def train(steps: range) -> None:
        nonlocal slowest
        for step in steps:
            for tracker in trackers.values():
                began = time.perf_counter()
                tracker.metrics({"train/loss": float("nan") if step == 7 else 1 / (1 + step), "train/lr": 0.1}, step)
                slowest = max(slowest, time.perf_counter() - began)
            time.sleep(0.01)

    train(range(30))
    wait_until(lambda: all("run_id" in read_state(recipe.output) for recipe in recipes.values()))
    runs = {name: tracker.run_id for name, tracker in trackers.items()}
    assert [read_state(recipes[name].output)["run_id"] for name in runs] == list(runs.values())
    server.kill()
    train(range(30, 90))
    trackers["one"].evaluation("town", 90, {"protocol": "25 m"}, {"recall_1": 50.0})
    wait_until(lambda: all("does not answer" in text.getvalue() for text in said.values()))
    server.start()
    train(range(90, 100))
    wait_until(lambda: all("answers again" in text.getvalue() for text in said.values()))
    for tracker in trackers.values():
        tracker.close("FINISHED")
    client = MlflowClient(server.uri)
    for name, tracker in trackers.items():
        run = client.get_run(tracker.run_id)
        assert tracker.run_id == runs[name]
        assert run.info.status == "FINISHED"
        assert steps_of(client, tracker.run_id) == list(range(100))
        history = {m.step: m for m in client.get_metric_history(tracker.run_id, "train/loss")}
        lines = {
            r["step"]: r for _, _, r in read_records(recipes[name].output / "metrics.jsonl") if r and "train/lr" in r
        }
        assert np.isnan(history[7].value)
        assert {s: (m.value, m.timestamp) for s, m in history.items() if s != 7} == {
            s: (line["train/loss"], line["time_ms"]) for s, line in lines.items() if s != 7
        }
        assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= run.data.metrics.keys()
        assert said[name].getvalue().count("does not answer") == said[name].getvalue().count("answers again") == 1
    assert slowest < BLOCKED_S
    assert len(runs_of(client, recipes["one"])) == 2
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{trackers['one'].run_id}'")
    assert [(c.info.status, c.data.params, c.data.metrics) for c in children] == [
        ("FINISHED", {"protocol": "25 m"}, {"eval/town/recall_1": 50.0, "eval/recall_1": 50.0})
    ]


def test_what_a_dead_server_missed_is_synced_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, folder = io.StringIO(), tmp_path / "run"
    recipe = recipe_for("http://ann:secret@127.0.0.1:9", folder)
    tracker = track(recipe, said)
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    tracker.artifact(folder / "recipe.yaml", "configuration")
    tracker.artifact(folder / "missing.txt")
    for step in range(2500):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.evaluation("town", 2500, {"protocol": "25 m"}, {"recall_1": 50.0})
    began = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - began < 10
    assert f"rerankvpr sync {folder}" in said.getvalue()
    assert "secret" not in said.getvalue()
    assert tracker.run_id is None

    assert f"rerankvpr sync {folder} --uri http://127.0.0.1:9\n" in said.getvalue()
    with pytest.raises(ValueError, match="which is neither MLFLOW_TRACKING_URI nor the default"):
        sync([str(folder)])
    with pytest.raises(ValueError, match="does not answer"):
        sync([str(folder), "--uri", "http://127.0.0.1:9"])
    assert sync([str(folder), "--uri", server.uri]) == 0
    text = capsys.readouterr().out
    assert "2 artifacts, 1 evaluations, 2,501 metrics" in text
    assert "missing.txt is gone" in text
    assert sync([str(folder), "--uri", server.uri]) == 0
    assert "nothing was left to send" in capsys.readouterr().out
    (folder / "metrics.sent").unlink()  # all again
    assert sync([str(folder), "--uri", server.uri]) == 0

    client = MlflowClient(server.uri)
    (run,) = runs_of(client, recipe)
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == list(range(2500))
    assert len(client.search_runs([run.info.experiment_id])) == 2
    assert run.data.params["optim.lr"] == "1e-05"
    assert run.data.tags["world_size"] == "1"
    assert not any("secret" in str(value) for value in [run.data.params, run.data.tags])
    stored = client.download_artifacts(run.info.run_id, "configuration/recipe.yaml", str(tmp_path))
    assert "secret" not in Path(stored).read_text()
    assert "secret" not in (folder / "metrics.jsonl").read_text()


def test_a_killed_training_goes_on_in_its_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = recipe_for(server.uri, folder)
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    process = forked.fork(training_that_never_ends, recipe)
    try:
        wait_until(lambda: read_state(folder).get("run_id"), 60)
        assert sync([str(folder)]) == 0
        assert "runs and sends by itself" in capsys.readouterr().out
    finally:
        forked.kill(process)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "time_m')  # half a line
    client = MlflowClient(server.uri)
    (run,) = runs_of(client, recipe)
    assert run.info.status == "RUNNING"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert sync([str(folder)]) == 0
    assert "KILLED: no end was written" in capsys.readouterr().out
    assert client.get_run(run.info.run_id).info.status == "KILLED"

    tracker = track(recipe.model_copy(update={"seed": 3}))  # no checkpoint knows the run
    wait_until(lambda: client.get_run(run.info.run_id).info.status == "RUNNING")
    tracker.metrics({"train/loss": 1.0}, 7)
    tracker.close("KILLED")
    (again,) = runs_of(client, recipe)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "KILLED")
    assert set(steps_of(client, run.info.run_id)) == {*range(6), 7}
    assert (again.data.params["seed"], again.data.tags["changed.seed"]) == ("0", "3")


def test_a_checkpoint_carries_its_run_to_another_folder(server: Server, tmp_path: Path) -> None:
    first = track(recipe_for(server.uri, tmp_path / "one"))
    first.metrics({"train/loss": 1.0}, 1)
    first.close("FINISHED")
    recipe = recipe_for(server.uri, tmp_path / "two")
    second = track(recipe, run_id=first.run_id)
    second.metrics({"train/loss": 1.0}, 2)
    second.close("FINISHED")
    assert second.run_id == first.run_id
    assert steps_of(MlflowClient(server.uri), first.run_id) == [1, 2]
    other = track(recipe_for(server.uri, tmp_path / "three"), run_id="0" * 32)  # a run of another store
    other.metrics({"train/loss": 1.0}, 3)
    other.close("FINISHED")
    assert len(runs_of(MlflowClient(server.uri), recipe)) == 2


def test_a_training_whose_server_was_away_has_one_run(server: Server, tmp_path: Path) -> None:
    """No checkpoint knows it: another folder, or a resume in another experiment, finds it by the training's tag."""
    away = track(recipe_for("http://127.0.0.1:9", tmp_path / "one"))
    away.metrics({"train/loss": 1.0}, 1)
    away.close("KILLED")
    assert away.run_id is None
    assert away.training is not None
    assert sync([str(tmp_path / "one"), "--uri", server.uri]) == 0

    moved = track(recipe_for(server.uri, tmp_path / "two"), training=away.training)
    moved.metrics({"train/loss": 1.0}, 2)
    wait_until(lambda: steps_of(MlflowClient(server.uri), moved.run_id) == [1, 2] if moved.run_id else False)
    (tmp_path / "one" / "metrics.sent").unlink()
    assert sync([str(tmp_path / "one"), "--uri", server.uri]) == 0
    assert MlflowClient(server.uri).get_run(moved.run_id).info.status == "RUNNING"
    moved.close("FINISHED")
    renamed = recipe_for(server.uri, tmp_path / "three", experiment="another")
    third = track(renamed, training=away.training)
    third.metrics({"train/loss": 1.0}, 3)
    third.evaluation("town", 3, {}, {"recall_1": 50.0})
    third.close("FINISHED")

    client = MlflowClient(server.uri)
    (tmp_path / "one" / "metrics.sent").unlink()
    assert sync([str(tmp_path / "one"), "--uri", server.uri]) == 0  # its older end is not the training's
    (run,) = runs_of(client, recipe_for(server.uri, tmp_path / "one"))
    assert run.info.status == "FINISHED"
    assert {moved.run_id, third.run_id} == {run.info.run_id}
    assert steps_of(client, run.info.run_id) == [1, 2, 3]
    assert client.get_experiment_by_name("another") is None
    (child,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert child.data.metrics == {"eval/town/recall_1": 50.0, "eval/recall_1": 50.0}


def test_what_a_store_refuses_holds_nothing_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    tracker = track(recipe_for(server.uri, tmp_path / "run"), said)
    for step in range(6):
        with monkeypatch.context() as patch:
            if step in (2, 4):
                patch.setattr(tracker, "_now_ms", lambda: -1)  # a clock before 1970
            tracker.metrics({"train/loss": 1.0, "bad$name": 2.0}, step)
    tracker.metrics({"train/loss": 10**400}, 6)  # MLflow holds no such number
    tracker.metrics({"train/loss": 1.0}, 2**63)
    tracker.metrics({"train/loss": 1.0}, 7)
    tracker.close("FINISHED")
    client = MlflowClient(server.uri)
    for name in ("train/loss", "at_a_glance/loss"):
        assert steps_of(client, tracker.run_id, name) == [0, 1, 3, 5, 7]
    assert steps_of(client, tracker.run_id, "bad_name") == [0, 1, 3, 5]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert said.getvalue().count("refuses a line") == 1, said.getvalue()
    assert said.getvalue().count("\n") == 1, said.getvalue()


def test_a_store_that_lost_the_run_gets_all_of_it(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tracker = track(recipe_for(server.uri, folder))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close("FINISHED")
    state = read_state(folder)
    (folder / "metrics.sent").write_text(json.dumps({**state, "run_id": "1" * 32}))
    said: list[str] = []
    sender = Sender(folder, server.uri, said.append)
    while sender.send():
        pass
    assert sender.run_id == tracker.run_id  # found by its tag
    assert sender.sent["metrics"] == 1
    assert "does not know run" in said[0]


def test_the_best_model_is_logged_and_loaded(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    recipe = recipe_for(server.database, folder, register_as="places")
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"backbone": "tiny14", "weights": "random", "aggregator": "gem"}),
            "data": recipe.data.model_copy(update={"image_size": 28}),
            "eval": recipe.eval.model_copy(update={"image_size": 28}),
        }
    )
    checkpoint, network = write_checkpoint(folder, recipe)
    said = io.StringIO()
    tracker = track(recipe, said)
    tracker.model(checkpoint)
    tracker.close("FINISHED")
    assert not said.getvalue(), said.getvalue()
    (folder / "metrics.sent").unlink()
    sender = Sender(folder, server.database, print)
    while sender.send():
        pass
    assert sender.sent["models"] == 1

    client = MlflowClient(server.database)
    (version,) = client.search_model_versions("name = 'places'")  # once, though it was sent twice
    assert version.run_id == tracker.run_id
    (logged,) = client.search_logged_models([client.get_run(tracker.run_id).info.experiment_id])
    assert (logged.name, logged.status, logged.source_run_id) == ("best", "READY", tracker.run_id)
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(server.database)
        local = mlflow.artifacts.download_artifacts("models:/places/1", dst_path=str(tmp_path))
        assert not [path for path in Path(local).rglob("*") if path.suffix in (".pkl", ".pyc")]
        loaded = mlflow.pyfunc.load_model(local)
        m = rerankvpr.load("models:/places/1", device="cpu")
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI names the store"):
            rerankvpr.load("models:/nothing/1")
    finally:
        mlflow.set_tracking_uri(before)
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 28, 28), dtype=np.uint8)
    with torch.inference_mode():
        expected = network(normalise(torch.from_numpy(images))).numpy()
    np.testing.assert_allclose(loaded.predict(images), expected, atol=1e-6)
    np.testing.assert_allclose(m.describe(images), expected, atol=1e-6)
    assert loaded.metadata.signature.outputs.inputs[0].shape == (-1, network.descriptor_size)
    about = loaded.metadata.metadata
    assert (about["pixels"], about["image_size"]) == ("28 px square, bilinear", 28)
    assert loaded.predict(loaded.metadata.load_input_example(local)).shape == (1, network.descriptor_size)
    assert {path.name for path in checkpoint.parent.iterdir()} == {checkpoint.name, "latest"}


def test_an_unreadable_model_is_not_counted(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, said = tmp_path / "run", io.StringIO()
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    tracker = track(recipe_for(server.uri, folder), said)
    tracker.model(checkpoint)
    tracker.close("FINISHED")
    assert f"the model of {checkpoint} is not logged: {checkpoint} has no manifest.json" in said.getvalue()
    (folder / "metrics.sent").unlink()
    capsys.readouterr()
    assert sync([str(folder), "--uri", server.uri]) == 0
    assert "models" not in capsys.readouterr().out
    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert logged.status == "FAILED"
