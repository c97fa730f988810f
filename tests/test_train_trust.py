"""Trainings against a second one, a changed recipe, a rate that diverges: real processes, one line each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlflow
import pytest

from data_pipeline.folder_lock import LOCK
from tests.forked import Command
from tests.training import last_checkpoint, logged
from trainer.manifest import faults

pytestmark = pytest.mark.slow


def train(workplace: Path, output: str, *flags: str) -> Command:
    recipe = str(workplace / "recipe.yaml")
    return Command(workplace, "rerankvpr", "train", recipe, "--output", str(workplace / output), *flags)


def ended(process: Command) -> tuple[int, str]:
    said, _ = process.communicate(timeout=600)
    assert process.returncode is not None
    return process.returncode, said


def our_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("rerankvpr: ")]


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == kind]


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """A training beside which a second one was started in the same output."""
    first = train(workplace, "run")
    deadline = time.monotonic() + 300
    while not (workplace / "run" / LOCK).exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    second = train(workplace, "run", "--resume", "--tracking.enabled", "False")
    status, said = ended(second)
    assert status == 2
    (line,) = our_lines(said)
    assert f"run: another process (rerankvpr train, pid {first.pid} on " in line
    status, said = ended(first)
    assert status == 0, said
    return workplace / "run"


def test_two_trainings_in_one_output_do_not_mix(trained: Path) -> None:
    assert sorted(logged(trained)) == list(range(1, 13))
    assert len(events(trained, "start")) == 1
    assert not faults(last_checkpoint(trained))
    assert not (trained / LOCK).exists()
    assert [event["status"] for event in events(trained, "end")] == ["FINISHED"]


def test_a_resume_says_what_of_the_recipe_has_changed(workplace: Path, trained: Path) -> None:
    changed = ("--optim.lr", "5e-4", "--trainer.epochs", "4", "--data.augmentation", "none")
    status, said = ended(train(workplace, "run", "--resume", *changed))
    assert status == 0, said
    line = next(line for line in said.splitlines() if line.startswith("resumed with another recipe: "))
    changes = {"optim.lr": "0.001 -> 0.0005", "trainer.epochs": "3 -> 4", "data.augmentation": "randaugment -> none"}
    assert all(f"{key} {change}" in line for key, change in changes.items())
    assert line.count(" -> ") == len(changes)
    assert events(trained, "start")[-1]["changes"] == changes
    client = mlflow.MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    (run,) = (
        run
        for run in client.search_runs([client.get_experiment_by_name("rerankvpr").experiment_id])
        if "mlflow.parentRunId" not in run.data.tags
    )
    assert {key: run.data.tags[f"changed.{key}"] for key in changes} == changes


def test_a_resume_that_makes_no_sense_is_refused_in_one_line(workplace: Path, trained: Path) -> None:
    status, said = ended(train(workplace, "run", "--resume", "--data.image-size", "42"))
    assert status == 2
    (line,) = our_lines(said)
    assert "was trained with data.image_size 28, this recipe has 42; they must agree" in line


def test_a_training_that_diverges_has_failed_and_keeps_its_good_checkpoints(workplace: Path, trained: Path) -> None:
    good = last_checkpoint(trained).name
    flags = ("--optim.lr", "1e38", "--trainer.epochs", "5", "--trainer.max-skipped-steps", "100")
    flags += ("--trainer.validate-every-epochs", "0")  # it is the end that finds it
    status, said = ended(train(workplace, "run", "--resume", *flags, "--optim.weight-decay", "0"))
    assert status == 2, said
    (line,) = our_lines(said)
    assert "the network holds numbers that are not finite: the training has diverged" in line
    assert last_checkpoint(trained).name == good
    assert not faults(last_checkpoint(trained))
    assert events(trained, "end")[-1]["status"] == "FAILED"


def test_a_validation_of_a_network_that_has_diverged_blames_no_image(workplace: Path, trained: Path) -> None:
    good = last_checkpoint(trained).name
    flags = ("--optim.lr", "1e38", "--trainer.epochs", "8", "--trainer.max-skipped-steps", "100")
    status, said = ended(train(workplace, "run", "--resume", *flags, "--optim.weight-decay", "0"))
    assert status == 2, said
    (line,) = our_lines(said)
    assert "the network holds numbers that are not finite: the training has diverged" in line
    assert last_checkpoint(trained).name == good
    assert events(trained, "end")[-1]["status"] == "FAILED"


def test_a_training_that_skips_too_much_has_failed(workplace: Path, trained: Path) -> None:
    """The first step takes the weights away; the next two have no loss, and the epoch has a fourth."""
    flags = ("--optim.lr", "1e38", "--trainer.epochs", "8", "--trainer.max-skipped-steps", "1")
    status, said = ended(train(workplace, "run", "--resume", *flags, "--optim.weight-decay", "0"))
    assert status == 2, said
    assert "more than trainer.max_skipped_steps" in our_lines(said)[0]
    assert events(trained, "end")[-1]["status"] == "FAILED"


def test_an_output_that_cannot_be_written_to_is_one_line(workplace: Path) -> None:
    (workplace / "file").write_text("")
    status, said = ended(train(workplace, "file/run"))
    assert status == 2
    assert any("file/run: cannot be written to (Not a directory)" in line for line in our_lines(said)), said
