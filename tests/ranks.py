"""Runs the `check_*` functions of test modules in real gloo processes.

A module writes `def check_xyz() -> None` functions that assert on every rank, and at its end
`test_on_ranks = on_ranks(__file__)`; pytest then shows one test for each check at world sizes 1, 2 and 4:

    python -m pytest tests/test_queue.py -k check_xyz          # one check at all world sizes
    python -m pytest "tests/test_queue.py::test_on_ranks[check_xyz-2]"

Checks of one world size share a group of processes, forked from a server that has imported torch and DeepSpeed. After a
check that fails or hangs the group is killed, and the next check gets a fresh one.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests import forked

ROOT = forked.ROOT
WORLD_SIZES = (1, 2, 4)
CHECK_TIMEOUT_S = 300
OTHERS_TIMEOUT_S = 10  # for ranks that go on when one has failed: in vain if they wait for it
COLLECTIVE_TIMEOUT_S = 60


class Group:
    """Processes in one gloo group, each of which runs the checks that it is sent."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix=f"ranks-of-{world_size}-"))
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = forked.server().Pipe()
            self.processes.append(forked.fork(_serve, theirs, self.folder, rank, world_size))
            self.pipes.append(ours)
            theirs.close()

    def run(self, module: str, check: str) -> list[str]:
        """Runs a check on all ranks; a text for each rank that failed, hung or died. Then the group is of no use."""
        seen = [len(self._printed(rank)) for rank in range(self.world_size)]
        errors: dict[int, str] = {}
        waiting = dict(zip(self.pipes, range(self.world_size), strict=True))
        for pipe in self.pipes:
            pipe.send((module, check))
        limit_s, deadline = CHECK_TIMEOUT_S, time.monotonic() + CHECK_TIMEOUT_S
        while waiting and (answered := wait(waiting, timeout=max(0, deadline - time.monotonic()))):
            for pipe in answered:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    error = f"ended with status {self.processes[rank].exitcode}"
                if error and not errors:
                    limit_s, deadline = OTHERS_TIMEOUT_S, min(deadline, time.monotonic() + OTHERS_TIMEOUT_S)
                if error:
                    errors[rank] = error
        failed_first = " after another rank failed" if errors else ""
        for rank in waiting.values():
            os.kill(self.processes[rank].pid, signal.SIGUSR2)  # prints where it is
        if waiting:
            time.sleep(1)
        for rank in waiting.values():
            errors[rank] = f"killed: not done {limit_s} s{failed_first}; the last that it printed is where it was"
        texts = []
        for rank, error in sorted(errors.items()):
            printed = self._printed(rank)[seen[rank] :].decode(errors="replace")[-4000:]
            said = f"\nit printed:\n{printed}" if printed else ""
            texts.append(f"rank {rank} of {self.world_size}: {error}{said}")
        return texts

    def end(self) -> None:
        """Kills what still runs and removes the folder."""
        for process in self.processes:
            forked.kill(process)
        for pipe in self.pipes:
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _printed(self, rank: int) -> bytes:
        file = self.folder / f"rank{rank}.txt"
        return file.read_bytes() if file.exists() else b""


GROUPS: dict[int, Group] = {}


def run_check(module: str, check: str, world_size: int) -> list[str]:
    """Errors of a check, one text a failing rank, in the group of its world size."""
    if world_size not in GROUPS:
        GROUPS[world_size] = Group(world_size)
    errors = GROUPS[world_size].run(module, check)
    if errors:
        GROUPS.pop(world_size).end()
    return errors


def end_groups() -> None:
    """Ends all groups, when the last test is done."""
    while GROUPS:
        GROUPS.popitem()[1].end()


def check_names(module: str) -> list[str]:
    """Names of the `check_*` functions of a test module, in source order."""
    lines = (ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines()
    return [line[4 : line.index("(")] for line in lines if line.startswith("def check_")]


def on_ranks(file: str, world_sizes: tuple[int, ...] = WORLD_SIZES) -> Callable[..., None]:
    """A pytest test over all checks of `file` and `world_sizes`; those of several ranks are marked `slow`."""
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)

    sizes = [pytest.param(size, marks=[pytest.mark.slow] if size > 1 else []) for size in world_sizes]

    @pytest.mark.parametrize("world_size", sizes)
    @pytest.mark.parametrize("check", check_names(module))
    @pytest.mark.usefixtures("groups_of_ranks")
    def test(check: str, world_size: int) -> None:
        errors = run_check(module, check, world_size)
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)

    return test


def shared_folder() -> Path:
    """A temporary folder that all ranks know; called by a check, on every rank."""
    import torch.distributed as dist

    holder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(holder)
    return Path(holder[0])


def _serve(tasks: Connection, folder: Path, rank: int, world_size: int) -> None:
    """A rank: runs the checks that it is sent and answers with their traceback or None, until the pipe is closed."""
    import torch
    import torch.distributed as dist

    for stream in (sys.stdout, sys.stderr):
        forked.redirect(folder / f"rank{rank}.txt", stream.fileno())
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    tempfile.tempdir = str(folder)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # as torchrun does
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    while True:
        try:
            module, check = tasks.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        error: Any = None
        try:
            getattr(importlib.import_module(module), check)()
        except BaseException:  # noqa: BLE001 - told to pytest, which ends the group
            error = traceback.format_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        tasks.send(error)
