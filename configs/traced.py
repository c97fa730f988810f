"""Names that a trace of steps (trainer.profile_steps) shows; where none is made they cost a look at a flag."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch.autograd import profiler

MOST_SPANS = 100_000
_QUIET: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Span:
    """What a thread did from a time to another, in nanoseconds since 1970."""

    name: str
    thread: int  # the system's number
    thread_name: str
    began_ns: int
    ended_ns: int


spans: deque[Span] = deque(maxlen=MOST_SPANS)  # since the trace began


def part(name: str) -> AbstractContextManager[Any]:
    """A `with` around what the training thread does under this name."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _QUIET


def beside(name: str) -> AbstractContextManager[None]:
    """As `part` in another thread: torch's profiler follows none that was there before it, so `spans` keeps this."""
    return _kept(name) if profiler._is_profiler_enabled else _QUIET


@contextmanager
def _kept(name: str) -> Iterator[None]:
    began = time.time_ns()
    try:
        yield
    finally:
        thread = threading.current_thread()
        spans.append(Span(name, thread.native_id or 0, thread.name, began, time.time_ns()))
