"""Whether processes can share locks, which Linux keeps in /dev/shm: a container may have none, or a full one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from configs.reading import reason


def why_no_locks() -> str:
    """Why processes cannot share locks, in a line; empty if they can."""
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        return f"/dev/shm, where processes share locks, cannot be used ({reason(error)})"
    return ""


def process_pool(processes: int, initializer: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """A pool of new processes. Raises OSError if processes cannot share locks."""
    if why := why_no_locks():
        raise OSError(f"{processes} processes: {why}; mount a tmpfs there, or ask for 1 process")
    # spawn: a fork of a process that has already run torch's threads may hang
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=initializer)
