"""Schedule, checkpoint folders and tracking by themselves."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from configs.schema import OptimConfig, Recipe
from trainer.checkpoint import (
    FORMAT,
    CheckpointError,
    best_recall,
    faults,
    find_checkpoint,
    newest_valid,
    point,
    prune,
    step_name,
)
from trainer.schedule import learning_rate
from trainer.tracking import Tracker, open_command


@given(
    st.sampled_from(["none", "cosine", "linear", "exp"]),
    st.integers(0, 50),
    st.integers(1, 300),
    st.floats(0.0, 1.0),
)
def test_rates_rise_in_warm_up_and_never_after(schedule: str, warmup: int, total: int, floor: float) -> None:
    optim = OptimConfig.model_validate(
        {"lr": 2.0, "warmup_steps": warmup, "schedule": schedule, "min_lr_ratio": floor, "gamma": 0.9}
    )
    rates = [learning_rate(s, total_steps=total, steps_per_epoch=7, optim=optim) for s in range(total)]
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in rates)
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == sorted(rise)
    assert all(a >= b - 1e-12 for a, b in pairwise(fall))
    if total > warmup:
        assert fall[0] == pytest.approx(2.0 if schedule != "exp" else 2.0 * 0.9 ** (warmup // 7))
    if total > warmup + 1 and schedule in ("cosine", "linear"):
        last = learning_rate(total, total_steps=total, steps_per_epoch=7, optim=optim)
        assert last == pytest.approx(2.0 * floor)


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("schedule", ["step", "multi_step", "exp", "cosine_with_restarts"])
def test_schedules_are_those_of_torch(schedule: str, unit: str) -> None:
    optim = OptimConfig.model_validate(
        {
            **{"lr": 0.5, "warmup_steps": 0, "schedule": schedule, "schedule_unit": unit, "gamma": 0.7},
            **{"step_size": 3, "milestones": [2, 5], "min_lr_ratio": 0.1},
        }
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedulers = torch.optim.lr_scheduler
    theirs = {
        "step": lambda: schedulers.StepLR(optimizer, 3, gamma=0.7),
        "multi_step": lambda: schedulers.MultiStepLR(optimizer, [2, 5], gamma=0.7),
        "exp": lambda: schedulers.ExponentialLR(optimizer, 0.7),
        "cosine_with_restarts": lambda: schedulers.CosineAnnealingWarmRestarts(optimizer, 3, eta_min=0.05),
    }[schedule]()
    for unit_number in range(9):
        steps = [unit_number] if unit == "step" else range(4 * unit_number, 4 * unit_number + 4)
        for step in steps:
            rate = learning_rate(step, total_steps=100, steps_per_epoch=4, optim=optim)
            assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / step_name(step)
    path.mkdir(parents=True)
    files = {"model.safetensors": b"m" * 100, "optimizer.json": b"e" * 50}
    for name, content in files.items():
        (path / name).write_bytes(content)
    digests = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    (path / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": step, "world_size": 1, "files": digests}))
    return path


def cut(path: Path) -> None:
    file = path / "optimizer.json"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])


def lose(path: Path) -> None:
    (path / "optimizer.json").unlink()


def unfinished(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "has 49 bytes, expected 50"), (flip, "differs from"), (lose, "is missing"), (unfinished, "was cut off")],
)
def test_resume_takes_the_newest_checkpoint_that_verifies(damage, words: str, tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 90), make_checkpoint(tmp_path, 100)
    assert newest_valid(tmp_path) == (newer, [])
    damage(newer)
    found, notes = newest_valid(tmp_path)
    assert found == older
    assert words in notes[0]
    assert newer.name in notes[0]
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(newer)


def test_a_run_means_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    first, second = make_checkpoint(folder, 5), make_checkpoint(folder, 10)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path / "run")
    point(folder / "latest", second)
    assert find_checkpoint(tmp_path / "run") == second
    assert best_recall(folder) == -1
    point(folder / "best", first, 61.5)
    assert best_recall(folder) == 61.5
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(folder / "best") == first
    assert find_checkpoint(folder / "latest") == find_checkpoint(second) == second
    assert not list(folder.glob("*.partial"))


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in range(1, 7)]
    (tmp_path / ".step-00000009.partial").mkdir()
    point(tmp_path / "best", made[1], 50.0)
    prune(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.glob("*step-*")) == [made[1].name, made[4].name, made[5].name]
    assert all(not faults(p) for p in (made[1], made[4], made[5]))


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    tracker = Tracker(Recipe(), tmp_path / "out", Console(), run_id=None, active=False)
    tracker.metrics({"a": 1.0}, 0)
    tracker.evaluation("town", 0, {}, {"recall_1": 50.0})
    tracker.artifact(tmp_path / "picture.png")
    tracker.model(tmp_path)
    tracker.flush()
    tracker.close("FINISHED")
    assert tracker.run_id is None
    assert not (tmp_path / "out").exists()


def test_the_command_that_is_shown_holds_no_password() -> None:
    assert open_command("sqlite:///mlflow.db") == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert open_command("https://ann:secret@host.example:5000/x") == "https://host.example:5000/x"
