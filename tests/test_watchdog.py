"""Who is to blame for a standstill, and ranks that wait for what is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import EngineConfig
from tests import forked
from tests.ranks import ROOT
from trainer.watchdog import SECTIONS, STALLED_STATUS, Position, culprit


def positions(orders: list[tuple[int, str]]) -> dict[int, Position]:
    return {rank: Position(step, section, 7, 61.0, f"n{rank}") for rank, (step, section) in enumerate(orders)}


def moved(before: dict[int, Position], silent: set[int]) -> dict[int, Position]:
    return {rank: p if rank in silent else replace(p, beat=p.beat + 1) for rank, p in before.items()}


places = st.tuples(st.integers(0, 3), st.sampled_from(SECTIONS))


@given(st.lists(places, min_size=1, max_size=9))
def test_of_ranks_that_speak_the_one_furthest_behind_is_named(orders: list[tuple[int, str]]) -> None:
    before = positions(orders)
    rank, text = culprit(before, moved(before, set()), len(orders))
    assert all(before[rank].order <= other.order for other in before.values())
    assert f"rank {rank} on n{rank} is in section {orders[rank][1]} of step {orders[rank][0]} since 61 s" in text


@given(st.lists(places, min_size=2, max_size=9), st.data())
def test_a_silent_rank_is_named_wherever_the_others_are(orders: list[tuple[int, str]], data: st.DataObject) -> None:
    before = positions(orders)
    silent = data.draw(st.sets(st.integers(0, len(orders) - 1), min_size=1, max_size=len(orders) - 1))
    after = moved(before, silent)
    rank, text = culprit(before, after, len(orders))
    assert rank == min(silent)
    assert f"rank {rank} on n{rank} is silent" in text
    assert f"last heard of in section {orders[rank][1]} of step {orders[rank][0]}" in text
    gone = {r: p for r, p in after.items() if r != rank}
    assert culprit(before, gone, len(orders))[1].startswith(f"rank {rank} does not answer")


def standing_still(folder: Path, limit_s: float) -> list[forked.Command]:
    """Two ranks, of which the first waits in a collective for the second."""
    ranks = [
        forked.Command(folder, "tests.stand_still", str(rank), str(folder), str(limit_s), apart=True) for rank in (0, 1)
    ]
    deadline = time.monotonic() + 120
    while not all((folder / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    return ranks


@pytest.mark.slow
def test_a_rank_that_is_asked_to_stop_while_it_waits_for_one_that_is_gone_ends(tmp_path: Path) -> None:
    """The other is stopped, so its sockets stay open, as a dead node's do: nothing but the watchdog ends the wait."""
    waits, gone = standing_still(tmp_path, 10)
    gone.send_signal(signal.SIGSTOP)
    waits.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, errors = waits.communicate(timeout=60)
    gone.kill()
    gone.communicate()
    assert waits.returncode == STALLED_STATUS
    assert time.monotonic() - began < 30  # launch's --shutdown-timeout is 120
    stack = (tmp_path / "stalled-rank-00000.txt").read_text()
    assert "rank 1" in stack
    assert "is silent" in errors + stack


@pytest.mark.slow
def test_a_rank_that_is_asked_to_stop_and_waits_for_one_that_is_there_goes_on(tmp_path: Path) -> None:
    waits, slow = standing_still(tmp_path, 2)
    for one in (waits, slow):
        one.send_signal(signal.SIGUSR1)
    time.sleep(4)  # some twenty beats
    assert waits.poll() is None
    (tmp_path / "go").touch()
    for rank, one in enumerate((waits, slow)):
        out, errors = one.communicate(timeout=60)
        assert one.returncode == 0, errors
        assert f"rank {rank} is past it, asked: True" in out


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_ranks_do_not_outlive_an_agent_that_is_killed(tmp_path: Path) -> None:
    """kill -9 of torchrun: its ranks are gone, and with them what they held."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, time; from pathlib import Path; from trainer.lifeline import end_with_parent; end_with_parent(); "
        f"(Path({str(tmp_path)!r}) / f'pid{{os.environ[\"RANK\"]}}').write_text(str(os.getpid())); time.sleep(120)"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    agent = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    agent.kill()
    agent.wait()
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_collectives_wait_longer_than_the_watchdog_where_it_speaks() -> None:
    assert EngineConfig().collective_timeout_s == 660  # NCCL would abort at 600, as the watchdog does in a first step
    assert EngineConfig(stall_s=0).collective_timeout_s == 600
    assert EngineConfig(timeout_s=10).collective_timeout_s == 10  # below stall_s: what was asked for
