"""A polite end: SIGTERM, SIGUSR1 and Ctrl-C are noted, and the training stops at a step that all ranks agree on."""

from __future__ import annotations

import os
import shlex
import signal
from types import FrameType
from typing import Any

from configs.load import without_secrets

REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run me again
COMMAND = "RERANKVPR_COMMAND"  # in the environment: the command that the user typed, for its ranks


class Stopped(Exception):
    """Ends a training that was asked to stop, after its checkpoint is written."""


class StoppedInEvaluation(Stopped):
    """Ends this rank of a training at once: others may be anywhere in an evaluation, so there is no agreed end."""


class StopSignal:
    """Notes, inside a `with`, that this process was asked to stop. Nothing is saved inside a signal handler."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])  # the second Ctrl-C does not wait for the step


def how_to_resume() -> str:
    """What to do after a stop: the command that the user typed, with --resume, where it is known."""
    words = shlex.split(os.environ.get(COMMAND, ""))
    if "train" not in words:
        return "--resume goes on from the last checkpoint"
    if "--resume" in words:
        at = words.index("--resume")
        named = words[at + 1 : at + 2]
        del words[at : at + 1 + (bool(named) and not named[0].startswith("-"))]
    return f"to go on: {without_secrets(shlex.join([*words, '--resume']))}"
