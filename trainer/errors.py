"""How a command ends on an error: one line for a user's mistake, from the rank that knows it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

USER_ERRORS = (ValueError, OSError)
OTHERS_WAIT_S = 3.0


class TrainingError(RuntimeError):
    """A training that must stop; the text says why, where, and what to do."""


@contextmanager
def one_line_errors(*extra: type[Exception]) -> Iterator[None]:
    """Turns mistakes of the user (and `extra` kinds) into a line on stderr and exit status 2.

    Where all ranks make the same mistake, rank 0 speaks and the launcher ends the others while they wait; a mistake
    that only another rank meets is told by that rank.
    """
    kinds: tuple[type[Exception], ...] = (*USER_ERRORS, *extra)
    try:
        yield
    except kinds as error:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if rank:
            time.sleep(OTHERS_WAIT_S)
        prefix = f"rerankvpr: rank {rank}: " if rank and world > 1 else "rerankvpr: "
        for line in str(error).splitlines():
            print(prefix + line, file=sys.stderr, flush=True)
        if os.environ.get("RERANKVPR_TRACEBACK"):
            raise
        sys.stdout.flush()
        os._exit(2) if world > 1 else sys.exit(2)
