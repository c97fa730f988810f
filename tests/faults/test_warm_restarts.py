"""Warm starts in full counts: restarts under one agent end with the same bits, and leave nothing behind."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil

from tests import forked
from tests.test_warm_starts import leaks
from tests.training import (
    STEPS,
    finish,
    kill_all,
    ranks_of,
    same_run,
    two_ranks,
)

KILLS = 15
STARTS = 200
LONG = ("--trainer.epochs", "12", "--tracking.enabled", "False")
TIMED = ("--trainer.checkpoint-every-s", "auto", "--trainer.mean-time-between-failures-s", "2")


def test_ranks_and_servers_killed_under_one_agent_end_with_the_same_bits(workplace: Path) -> None:
    """One rank, all ranks or the fork server get SIGKILL in turn, while saves come by the clock."""
    finish(two_ranks(workplace, "unbroken", *LONG))
    folder, rng = workplace / "restarted", random.Random(1)
    launcher = ("rerankvpr", "launch", "--nproc-per-node", "2", "--max-restarts", "100", "--")
    recipe = str(workplace / "recipe.yaml")
    process = forked.Command(workplace, *launcher, "train", recipe, "--output", str(folder), *LONG, *TIMED)
    agent, kills, seen = psutil.Process(process.pid), 0, 0
    while kills < KILLS:
        deadline = time.monotonic() + 180
        while process.poll() is None and size_of(folder / "metrics.jsonl") <= seen:
            assert time.monotonic() < deadline, "no step since the last kill"
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.0))
        if process.poll() is not None:
            break  # came to its end between two kills
        servers = [one for one in agent.children() if "rerankvpr:fork-server" in one.cmdline()]
        for victim in (ranks_of(process)[:1], ranks_of(process), servers)[kills % 3]:
            victim.kill()
        seen = size_of(folder / "metrics.jsonl")
        kills += 1
    assert kills >= 3
    finish(process)
    same_run(workplace / "unbroken", folder, 4 * STEPS)


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def test_a_killed_agent_takes_all_with_it(workplace: Path) -> None:
    launcher = ("rerankvpr", "launch", "--nproc-per-node", "2", "--")
    arguments = ("train", str(workplace / "recipe.yaml"), "--output", str(workplace / "agent"), *LONG)
    process = forked.Command(workplace, *launcher, *arguments)
    try:
        while not (workplace / "agent" / "metrics.jsonl").exists():
            assert process.poll() is None, process.output()[0]
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # the server and two ranks
        process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
    finally:
        if process.poll() is None:
            kill_all(process)


def test_two_hundred_starts_in_a_row_leak_nothing(tmp_path: Path) -> None:
    leaks(STARTS, tmp_path)
