"""Schedule and tracking by themselves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from configs.schema import OptimConfig, Recipe
from trainer.schedule import learning_rate, validations_since_best
from trainer.tracking import Tracker, open_command, where_shown


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


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 4))
def test_plateau_is_that_of_torch(recalls: list[int], patience: int) -> None:
    optim = OptimConfig(lr=0.5, warmup_steps=0, schedule="plateau", gamma=0.7, plateau_evals=patience)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.7, patience=patience - 1, threshold=0, eps=0
    )
    for i, recall in enumerate(recalls):
        theirs.step(recall)
        rate = learning_rate(9, total_steps=100, steps_per_epoch=4, optim=optim, recalls=map(float, recalls[: i + 1]))
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])


def test_validations_are_counted_from_the_first_best_one() -> None:
    assert [validations_since_best(r) for r in ([], [3.0], [3.0, 3.0], [1.0, 3.0, 2.0, 3.0])] == [0, 0, 1, 2]


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    tracker = Tracker(Recipe(), tmp_path / "out", Console(), training=None, run_id=None, active=False)
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


def test_the_address_that_is_shown_is_of_the_menu_of_training() -> None:
    own = where_shown("sqlite:///mlflow.db", "7", "abc")
    assert own == {
        "curves in MLflow": "http://127.0.0.1:5000/#/experiments/7/runs/abc/model-metrics?workflowType=machine_learning",
        "which is served by": "mlflow ui --backend-store-uri sqlite:///mlflow.db",
    }
    address = "https://host.example:5000/x/#/experiments/7/runs?workflowType=machine_learning"
    assert where_shown("https://ann:secret@host.example:5000/x/", "7") == {"curves in MLflow": address}
    assert where_shown("databricks://profile", "7") == {}
