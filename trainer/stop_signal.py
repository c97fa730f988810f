"""A polite end: SIGTERM and SIGUSR1 are noted, and the training stops at a step boundary that all ranks agree on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run me again


class Stopped(Exception):
    """Ends a training that was asked to stop, after its checkpoint is written."""


class StopSignal:
    """Notes, inside a `with`, that this process was asked to stop. Nothing is saved inside a signal handler."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
