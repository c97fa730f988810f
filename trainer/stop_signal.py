"""A polite end: SIGTERM, SIGUSR1 and Ctrl-C are noted, and the training stops at a step that all ranks agree on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from types import FrameType
from typing import Any

from configs.secrets import without_secrets

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run me again
COMMAND = "RERANKVPR_COMMAND"  # in the environment: the command that the user typed, for its ranks


class Stopped(BaseException):
    """Ends a training that was asked to stop, after its checkpoint is written; as Ctrl-C, it is nobody's error."""


class StoppedInEvaluation(Stopped):
    """Ends this rank of a training at once: others may be anywhere in an evaluation, so there is no agreed end."""


class StopSignal:
    """Notes, inside a `with`, that this process was asked to stop. Nothing is saved inside a signal handler.

    Python runs handlers in the main thread alone, between its own instructions: not while that waits inside a CUDA
    call or a collective. So the C handler also writes each signal's number to a pipe, which `noticed` reads from any
    thread.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def __enter__(self) -> StopSignal:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])  # the second Ctrl-C does not wait for the step

    def noticed(self) -> str:
        """Name of the signal that asked for a stop, empty if none has; from any thread, at any moment."""
        if self._pipe and not self.name:
            with contextlib.suppress(OSError):  # nothing was written, or the pipe has just been closed
                for number in os.read(self._pipe[0], 64):
                    if number in STOPPING:
                        self.name = signal.Signals(number).name
        return self.name


def how_to_resume() -> str:
    """What to do after a stop: the command that the user typed, with --resume, where it is known."""
    words = shlex.split(os.environ.get(COMMAND, ""))
    if "train" not in words:
        return "--resume continues from the last checkpoint"
    if "--resume" in words:
        at = words.index("--resume")
        named = words[at + 1 : at + 2]
        del words[at : at + 1 + (bool(named) and not named[0].startswith("-"))]
    return f"to resume: {shlex.join(without_secrets(word, is_address=True) for word in [*words, '--resume'])}"
