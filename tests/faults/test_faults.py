"""The long form of the promises on faults: `make test-faults`, about a quarter of an hour on two cores."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from tests import forked, training
from trainer.checkpoint import checkpoint_weights
from trainer.checkpoint_folder import newest_valid

KILLS = 20
LONG = ("--trainer.epochs", "12", "--trainer.keep-last", "3", "--tracking.enabled", "False")


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """A training of 48 steps, a checkpoint every second and an evaluation every fourth of them."""
    training.finish(training.two_ranks(workplace, "unbroken", *LONG))
    return workplace / "unbroken"


def test_killed_twenty_times_it_ends_with_the_same_bits(workplace: Path, unbroken: Path) -> None:
    """SIGKILL at random moments, in steps, saves and evaluations; each resumption has to get on before the next."""
    killed = training.train_with_kills(workplace, "killed", *LONG, kills=KILLS, within_s=1.2)
    assert killed >= KILLS // 2
    training.same_run(unbroken, workplace / "killed", 4 * training.STEPS)


@pytest.mark.parametrize("ranks", [1, 4])
def test_it_goes_on_at_another_world_size_and_stage(workplace: Path, unbroken: Path, ranks: int) -> None:
    """The last three steps of two ranks at ZeRO 1, by one or by four ranks at ZeRO 3."""
    source = sorted((unbroken / "checkpoints").glob("step-*"))[0]
    folder = workplace / f"moved_{ranks}"
    shutil.copytree(source, folder / "checkpoints" / source.name)
    flags = (*LONG, "--resume", "--engine.zero-stage", "3", "--eval.benchmarks")
    if ranks == 1:
        training.finish(training.one_rank(workplace, folder.name, *flags))
    else:
        launcher = ("rerankvpr", "launch", "--nproc-per-node", "4", "--")
        recipe = str(workplace / "recipe.yaml")
        training.finish(forked.Command(workplace, *launcher, "train", recipe, "--output", str(folder), *flags))
    one, two = training.logged(folder), training.logged(unbroken)
    assert len(one) >= 2
    # float32 sums in another order, amplified by Adam over the steps that remain
    assert [one[s]["train/loss"] for s in one] == pytest.approx([two[s]["train/loss"] for s in one], rel=1e-3)
    ours, theirs = (checkpoint_weights(training.last_checkpoint(f)) for f in (folder, unbroken))
    largest = max((ours[name] - theirs[name]).abs().max().item() for name in ours if "qkv.bias" not in name)
    assert largest < 1e-4  # a key bias has no true gradient: Adam moves it by rounding alone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_in_time(workplace: Path, rank: int) -> None:
    """Rank 0 keeps the store that the others read; stopped, it is named as rank 1 is."""
    faults = {"stop": {"rank": rank, "step": 5}}
    process = training.faulty_ranks(workplace, workplace / f"stop_{rank}", faults, *LONG, "--engine.stall-s", "8")
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert re.search(rf"rerankvpr: rank {rank}.*its process is stopped, or its node is gone", text), text
    found, _ = newest_valid(workplace / f"stop_{rank}" / "checkpoints")
    assert found
    assert found.name >= "step-00000002"


def test_asked_to_stop_it_has_saved_within_half_a_minute(workplace: Path) -> None:
    folder = workplace / "asked"
    process = training.two_ranks(workplace, "asked", *LONG)
    while not (folder / "metrics.jsonl").exists() or not training.logged(folder):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    training.ranks_of(process)[0].terminate()
    asked = time.monotonic()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert time.monotonic() - asked < 30
    assert "saved at step" in text
