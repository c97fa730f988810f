"""A training with hard places, killed again and again: the same batches and bits."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests import training

KILLS = 6
FLAGS = (
    *("--data.hard-share", "0.5", "--data.hard-every-steps", "3", "--trainer.epochs", "9", "--trainer.keep-last", "3"),
    *("--tracking.enabled", "False", "--eval.benchmarks"),
)


def test_killed_within_hard_epochs_it_ends_with_the_same_bits(workplace: Path) -> None:
    """SIGKILL to all ranks at random moments, of encoding and composing too."""
    training.finish(training.two_ranks(workplace, "unbroken", *FLAGS))
    rng, folder, kills = random.Random(1), workplace / "killed", 0
    process = training.two_ranks(workplace, "killed", *FLAGS, "--resume")
    metrics = folder / "metrics.jsonl"
    while kills < KILLS:
        seen = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.stat().st_size > seen:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[0]
            break  # came to its end between two kills
        training.kill_all(process)
        kills += 1
        process = training.two_ranks(workplace, "killed", *FLAGS, "--resume")
    if process.poll() is None:
        training.finish(process)
    assert kills >= 2
    unbroken = workplace / "unbroken"
    training.same_state(training.last_checkpoint(unbroken), training.last_checkpoint(folder))
    one, other = training.logged(unbroken), training.logged(folder)
    assert sorted(one) == sorted(other) == list(range(1, 37))
    assert [one[s]["train/loss"] for s in sorted(one)] == [other[s]["train/loss"] for s in sorted(other)]
