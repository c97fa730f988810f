"""Joining a group: how long a connection, and then a collective, may take."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import forked
from tests.ports import free_port
from trainer import process_group
from trainer.one_start import store_of_this_start

CONNECT_S = 2


def in_group(target: Callable[[int, Path], None], folder: Path) -> list[int | None]:
    """Exit statuses of two processes that call `target(rank, folder)`."""
    port = free_port()
    ranks = [forked.fork(_as_rank, target, rank, port, folder) for rank in range(2)]
    for process in ranks:
        process.join(60)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        forked.kill(process)
    return statuses


def _as_rank(target: Callable[[int, Path], None], rank: int, port: int, folder: Path) -> None:
    group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    process_group.CONNECT_S = CONNECT_S
    target(rank, folder)


def join(rank: int) -> None:
    """Joins a group of two."""
    process_group.connect_by_gloo(process_group.rank_store(60), rank, 2, 60)


def late_to_a_collective(rank: int, folder: Path) -> None:
    time.sleep(rank * (CONNECT_S + 1))  # late to arrive
    join(rank)
    time.sleep(rank * (CONNECT_S + 1))
    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"{rank}.txt").write_text(str(total.item()))


@pytest.mark.slow
def test_ranks_may_be_late_but_not_to_connect(tmp_path: Path) -> None:
    assert in_group(late_to_a_collective, tmp_path) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["2.0", "2.0"]


def never_connected(rank: int, folder: Path) -> None:
    if rank == 1:
        process_group.rank_store(60)
        time.sleep(CONNECT_S + 3)
        return
    began = time.monotonic()
    try:
        join(rank)
    except ConnectionError as error:
        (folder / "said.txt").write_text(str(error))
    (folder / "seconds.txt").write_text(str(time.monotonic() - began))


@pytest.mark.slow
def test_a_connection_that_is_never_made_ends_in_one_line(tmp_path: Path) -> None:
    assert in_group(never_connected, tmp_path) == [0, 0]
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("rank 0: a connection to another rank took longer than 2 s")
    assert "\n" not in said
    assert float((tmp_path / "seconds.txt").read_text()) < 30


@pytest.mark.parametrize("late", [0, 1])
def test_a_restart_meets_nothing_of_the_start_before(tmp_path: Path, late: int) -> None:
    """torchrun's agent keeps its store over restarts: an address of the start before is one that nobody listens on."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # as the agent serves it
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, late_by_s in zip(folders, (0.0, 1.0), strict=True):
        folder.mkdir()
        ranks = [forked.fork(restarted, rank, store.port, folder, late_by_s * (rank == late)) for rank in range(2)]
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [-signal.SIGKILL] * 2, folder.name
        assert [(folder / f"{rank}.txt").read_text() for rank in range(2)] == ["2.0", "2.0"]


def restarted(rank: int, port: int, folder: Path, late_by_s: float) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    _as_rank(met, rank, port, folder / str(late_by_s))


def met(rank: int, folder: Path) -> None:
    time.sleep(float(folder.name))
    process_group.CONNECT_S = 20
    join(rank)
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.new_group([0, 1])  # as DeepSpeed does; it connects at once
    (folder.parent / f"{rank}.txt").write_text(str(total.item()))
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_who_does_not_arrive_ends_in_one_line() -> None:
    store = dist.HashStore()
    for rank in range(2):
        with pytest.raises(ConnectionError, match=rf"^rank {rank}: not all of 2 ranks arrived within 1 s"):
            store_of_this_start(store, "ranks", rank, 2, 1)


def test_a_rank_that_is_gone_does_not_count() -> None:
    """Words of a start before are there when rank 0 comes; it answers the word that comes after, and waits for it."""
    store = dist.HashStore()
    store.set("ranks/rank/1", "gone")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store_of_this_start, store, "ranks", 0, 2, 10)
        time.sleep(0.2)
        assert not first.done()
        second = pool.submit(store_of_this_start, store, "ranks", 1, 2, 10)
        first.result().set("word", "of this start")
        assert second.result().get("word") == b"of this start"


def test_alone_it_leaves_the_port_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port found free beforehand was another's by the time the store listened, where many programs began at once."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # back to what it was, whatever is set meanwhile
    assert process_group.rank_and_world_size() == (0, 1)
    stores = [process_group.rank_store(60) for _ in range(2)]  # one port for both would be a conflict
    for number, store in enumerate(stores):
        store.set("number", str(number))
    assert [store.get("number") for store in stores] == [b"0", b"1"]
