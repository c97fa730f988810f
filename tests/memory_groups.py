"""Groups of processes that the kernel gives little memory: cgroups of version 2 or 1, where this machine lets tests."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOTS = {"memory.max": Path("/sys/fs/cgroup"), "memory.limit_in_bytes": Path("/sys/fs/cgroup/memory")}
_COUNT = itertools.count()


@contextmanager
def memory_group(num_bytes: int) -> Iterator[Path]:
    """An empty group of so many bytes, below the root of all groups; skips the test, saying what refused, without."""
    refused = []
    for limit, root in ROOTS.items():
        if not (root / "cgroup.procs").is_file():
            refused.append(f"{root} is no folder of groups")
            continue
        group = root / f"rerankvpr-test-{os.getpid()}-{next(_COUNT)}"
        try:
            group.mkdir()
        except OSError as error:
            refused.append(str(error))
            continue
        try:
            if not (group / limit).is_file():  # version 2 gives it to groups whose parent says so
                (root / "cgroup.subtree_control").write_text("+memory")
            (group / limit).write_text(str(num_bytes))
        except OSError as error:
            group.rmdir()
            refused.append(str(error))
            continue
        try:
            yield group
        finally:
            _remove(group)
        return
    pytest.skip(f"no cgroup with a limit of memory can be made here: {'; '.join(refused)}")


def join_group(group: Path, process: int) -> None:
    """Puts a process into a group; what it takes from then on counts."""
    (group / "cgroup.procs").write_text(str(process))


def _remove(group: Path) -> None:
    """A group is busy for a moment after its last process has ended."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
