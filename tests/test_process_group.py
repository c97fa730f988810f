"""Joining a group: how long a connection, and then a collective, may take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests import forked
from trainer import process_group
from trainer.ports import free_port

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


def late_to_a_collective(rank: int, folder: Path) -> None:
    time.sleep(rank * (CONNECT_S + 1))  # late to arrive
    process_group.connect_by_gloo(60)
    time.sleep(rank * (CONNECT_S + 1))
    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"{rank}.txt").write_text(str(total.item()))


def test_ranks_may_be_late_but_not_to_connect(tmp_path: Path) -> None:
    assert in_group(late_to_a_collective, tmp_path) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["2.0", "2.0"]


def never_connected(rank: int, folder: Path) -> None:
    if rank == 1:
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, timeout=timedelta(seconds=60))
        dist.PrefixStore("ranks", store).add("arrived", 1)
        time.sleep(CONNECT_S + 3)
        return
    began = time.monotonic()
    try:
        process_group.connect_by_gloo(60)
    except ConnectionError as error:
        (folder / "said.txt").write_text(str(error))
    (folder / "seconds.txt").write_text(str(time.monotonic() - began))


def test_a_connection_that_is_never_made_ends_in_one_line(tmp_path: Path) -> None:
    assert in_group(never_connected, tmp_path) == [0, 0]
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("rank 0: a connection to another rank took longer than 2 s")
    assert "\n" not in said
    assert float((tmp_path / "seconds.txt").read_text()) < 30
