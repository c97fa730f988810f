"""The long form of the promises on faults: `make test-faults`, about a quarter of an hour on two cores."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests import forked, training
from tests.memory_groups import join_group, memory_group
from tests.test_trust_limits import FULL, NONE, SMALL, with_shm
from trainer.checkpoint import checkpoint_weights
from trainer.checkpoint_folder import newest_valid

LONG = ("--trainer.epochs", "12", "--trainer.keep-last", "3", "--tracking.enabled", "False")


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """A training of 48 steps, a checkpoint every second and an evaluation every fourth of them."""
    training.finish(training.two_ranks(workplace, "unbroken", *LONG))
    return workplace / "unbroken"


@pytest.mark.parametrize(
    ("victim", "kills", "most_steps", "seed"),
    [("everything", 20, 3, 0), ("one rank", 10, 7, 1), ("all ranks", 10, 7, 2), ("launcher", 10, 7, 3)],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    workplace: Path, unbroken: Path, victim: str, kills: int, most_steps: int, seed: int
) -> None:
    """SIGKILL in steps, saves and evaluations; each resumption has to get on before the next."""
    name, rng = f"killed {victim}", random.Random(seed)
    kill = training.kill_all if victim == "everything" else lambda process: _kill(process, victim, rng)
    moments = {"kills": kills, "within_s": 0.3, "most_steps": most_steps, "seed": seed}
    killed = training.train_with_kills(workplace, name, *LONG, **moments, kill=kill)
    assert killed >= kills // 2
    training.same_run(unbroken, workplace / name, 4 * training.STEPS)


def _kill(process: forked.Command, victim: str, rng: random.Random) -> None:
    """SIGKILL to some of a launch; all others end by themselves, the launcher with the rank and the signal."""
    family, ranks = psutil.Process(process.pid).children(recursive=True), training.ranks_of(process)
    chosen = {"one rank": rng.sample(ranks, min(1, len(ranks))), "all ranks": ranks, "launcher": []}[victim]
    for rank in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    if not chosen:
        process.send_signal(signal.SIGKILL)
    text, _ = process.communicate(timeout=180)
    assert not psutil.wait_procs(family, timeout=60)[1], text
    assert "Traceback" not in text
    if process.returncode and chosen:  # else it came to its end at that moment
        assert "(SIGKILL): out of memory, if nobody sent it" in text or "is gone" in text, text


def test_a_rank_without_memory_is_one_line(workplace: Path) -> None:
    process = training.faulty_ranks(workplace, workplace / "no_memory", {"memory": {"rank": 1, "step": 2}}, *LONG)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    lines = [line for line in text.splitlines() if line.startswith("rerankvpr: ")]
    (line,) = [line for line in lines if "another rank is gone" not in line]  # rank 0 may say that, or be ended before
    assert line.startswith("rerankvpr: rank 1: out of memory (")


@pytest.mark.parametrize("kind", [NONE, FULL])
def test_verbs_of_one_process_work_without_shared_memory(workplace: Path, kind: str) -> None:
    """A tracked training, an evaluation, an index that is built and asked, an export, a small shard set."""
    home = workplace / f"alone {kind}"
    home.mkdir()
    run, index = str(home / "run"), str(home / "index")
    town, photos = workplace / "town", workplace / "town" / "images" / "test"
    recipe, store = str(workplace / "recipe.yaml"), f"sqlite:///{home / 'store.db'}"
    commands = (
        ("train", recipe, "--output", run, "--trainer.max-steps", "2", "--tracking.uri", store),
        ("eval", "--checkpoint", run, "--benchmarks", f"folder:{town}", "--recall-at", "1", "--out", str(home / "out")),
        ("index", "build", str(photos / "database"), "--checkpoint", run, "--out", index),
        ("locate", str(photos / "queries"), "--index", index, "--json", str(home / "found.json")),
        ("export", run, str(home / "net.safetensors")),
        ("shard", "gsv-cities", str(workplace / "native"), str(home / "set")),
        ("report", str(home / "out")),
    )
    for command in commands:
        done = with_shm(kind, "-m", "rerankvpr", *command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert "FINISHED" in (home / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", [NONE, FULL, SMALL])
def test_two_ranks_train_and_evaluate_without_shared_memory(workplace: Path, kind: str) -> None:
    launch = ("-m", "rerankvpr", "launch", "--nproc-per-node", "2", "--")
    output = str(workplace / f"no_shm {kind}")
    flags = ("--output", output, "--trainer.max-steps", "2", "--tracking.enabled", "False")
    done = with_shm(kind, *launch, "train", str(workplace / "recipe.yaml"), *flags)
    assert done.returncode == 0, done.stderr
    told = "ranks start cold: /dev/shm, where processes share locks, cannot be used" in done.stderr
    assert told == (kind != SMALL)
    assert "trained 2 steps" in done.stdout
    evaluated = ("--benchmarks", f"folder:{workplace / 'town'}", "--image-size", "28", "--recall-at", "1")
    done = with_shm(kind, *launch, "eval", "--checkpoint", output, *evaluated)
    assert done.returncode == 0, done.stderr


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


def test_a_rank_whose_cgroup_has_no_memory_is_named_with_the_signal(workplace: Path) -> None:
    """The kernel kills it, the launcher names rank and signal, the other rank ends, and the training resumes."""
    folder = workplace / "no_memory_group"
    with memory_group(1 << 16) as group:  # for what the rank takes once it is in it
        process = training.two_ranks(workplace, folder.name, *LONG)
        metrics = folder / "metrics.jsonl"
        assert forked.wait_until(lambda: process.poll() is not None or metrics.exists(), 180)
        ranks = training.ranks_of(process)
        join_group(group, ranks[1].pid)
        text, _ = process.communicate(timeout=180)
    assert process.returncode == 1, text
    assert "rerankvpr: rank 1 ended the job with status -9 (SIGKILL): out of memory, if nobody" in text, text
    assert "Traceback" not in text
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    training.finish(training.two_ranks(workplace, folder.name, *LONG, "--resume"))
