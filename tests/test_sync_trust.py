"""`rerankvpr sync` of a folder that came from somebody else: what is sent, and where to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from configs.load import recipe_text
from configs.schema import Recipe
from data_pipeline.folder_lock import LOCK, FolderLock, LockedError
from launch.sync_command import main as sync
from tests.stores import new_store

SECRET = "the key of this machine"


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder whose log names a local file in every way that a path can, among what is its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    secret, folder = tmp_path / "id_rsa", tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    secret.write_text(SECRET)
    (folder / "results.json").write_text("{}")
    (folder / "pictures" / "0.png").write_text("png")
    (folder / "link.txt").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "fifo")
    names = [
        str(secret),
        "../id_rsa",
        "link.txt",
        "linked/id_rsa",
        "loop",
        "fifo",
        "pictures",
        "a\0b",
        "x/../../id_rsa",
    ]
    lines: list[dict[str, object]] = [
        {"event": "start", "training": "t", "run_id": None, "name": "n", "experiment": "e", "params": {}, "facts": {}},
        *({"event": "artifact", "path": name, "folder": None} for name in names),
        {"event": "model", "checkpoint": "../other/checkpoints/step-00000001", "register_as": ""},
        {"step": 1, "train/loss": 1.0},
        {"event": "artifact", "path": "results.json", "folder": None},
        {"event": "artifact", "path": "pictures/0.png", "folder": "pictures"},
        {"step": 2, "train/loss": 2.0},
        {"event": "end", "status": "FINISHED"},
    ]
    text = "".join(json.dumps(line | {"time_ms": 1_700_000_000_000}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def store_of(folder: Path, name: str = "mlflow.db") -> str:
    """A store beside the folder; MLflow keeps one open for each address, so each test has its own."""
    file = folder.parent / name
    return f"sqlite:///{file}" if file.exists() else new_store(file)


def artifacts(client: MlflowClient, run: str, folder: str | None = None) -> set[str]:
    found = set()
    for item in client.list_artifacts(run, folder):
        found |= artifacts(client, run, item.path) if item.is_dir else {item.path}
    return found


def test_only_files_inside_the_folder_are_sent(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync(["run", "--uri", store_of(foreign)]) == 0
    said = capsys.readouterr().out
    assert f"run: sending to {store_of(foreign)}" in said
    # A loop of links is a file that is gone from Python 3.13 on, as `fifo` and `pictures` are everywhere.
    outside = 7 if sys.version_info >= (3, 13) else 8
    assert said.count("is outside run, or a link that leads out: not sent to MLflow") == outside
    assert said.count(": not sent to MLflow") == 10
    client = MlflowClient(store_of(foreign))
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert artifacts(client, run.info.run_id) == {"results.json", "pictures/0.png"}
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 2.0)
    sent = [file for file in foreign.parent.joinpath("mlruns").rglob("*") if file.is_file()]
    assert sent
    assert not any(SECRET in file.read_text(errors="replace") for file in sent)


def test_the_store_of_somebody_else_is_named_by_hand(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = "http://collector.example:5000"
    (foreign / "recipe.yaml").write_text(recipe_text(Recipe.model_validate({"tracking": {"uri": theirs}})))
    with pytest.raises(ValueError, match=f"names the store {theirs}, which is neither .* sync run --uri {theirs}"):
        sync(["run"])
    assert not (foreign / "metrics.sent").exists()
    own = store_of(foreign, "own.db")
    (foreign / "recipe.yaml").write_text(recipe_text(Recipe.model_validate({"tracking": {"uri": own}})))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    assert sync(["run"]) == 0


def test_a_file_that_cannot_be_sent_holds_nothing_up_and_is_tried_again(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mlruns").write_text("where the store's files should go")
    with pytest.raises(ValueError, match="2 files could not be sent; the same command tries them again"):
        sync(["run", "--uri", store_of(foreign)])
    assert "2 metrics" in capsys.readouterr().out
    client = MlflowClient(store_of(foreign))
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 2.0)
    Path("mlruns").unlink()
    assert sync(["run", "--uri", store_of(foreign)]) == 0
    assert artifacts(client, run.info.run_id) == {"results.json", "pictures/0.png"}
    assert sync(["run", "--uri", store_of(foreign)]) == 0
    assert "nothing was left to send" in capsys.readouterr().out


def test_one_sync_at_a_time(foreign: Path) -> None:
    with FolderLock(foreign, "sending to MLflow", name=f"{LOCK}.sending"), pytest.raises(LockedError):
        sync(["run", "--uri", store_of(foreign)])
    with FolderLock(foreign, "rerankvpr train"):
        assert sync(["run", "--uri", store_of(foreign)]) == 0
    assert not (foreign / "metrics.sent").exists()  # left to its training
