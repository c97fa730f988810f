"""A training with hard places, killed again and again: the same batches and bits."""

from __future__ import annotations

from pathlib import Path

from tests import training

FLAGS = (
    *("--data.hard-share", "0.5", "--data.hard-every-steps", "3", "--trainer.epochs", "9", "--trainer.keep-last", "3"),
    *("--tracking.enabled", "False", "--eval.benchmarks"),
)


def test_killed_within_hard_epochs_it_ends_with_the_same_bits(workplace: Path) -> None:
    """SIGKILL to all ranks at random moments, of encoding and composing too."""
    training.finish(training.two_ranks(workplace, "unbroken", *FLAGS))
    assert training.train_with_kills(workplace, "killed", *FLAGS, kills=6, within_s=0.3, most_steps=8, seed=1) >= 2
    training.same_run(workplace / "unbroken", workplace / "killed", 36)
