"""How a verb ends that is asked to stop by SIGTERM or Ctrl-C: with one line, in bounded time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.errors import asked_to_stop, leave

GRACE_S = 10.0

KEPT = {
    "train": "before its first step in this start, so nothing is lost; add --resume where it was started before",
    "shard": "tars that are whole stay, the same command resumes",
    "eval": "with --features, features that are whole stay and the same command resumes",
    "index": "features that are whole stay and readers see the index as it was; the same command resumes",
    "locate": "what is printed holds; files asked for are not written",
    "export": "no export is there in part; the same command begins again",
    "sync": "what is sent stays sent, the same command resumes",
    "demo": "what is whole stays, the same command resumes",
    "submit": "jobs that are submitted stay in the queue: squeue --me shows them",
    "launch": "its processes are asked to stop",
}


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process; libraries take it for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def one_line_when_interrupted(verb: str, *, ends: bool = False) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into an exception, and that into a line of rank 0 and status 128 + the signal.

    A process that waits in C code (a collective, a search) does not see the exception: after `GRACE_S` it ends all the
    same. A verb that installs a handler of its own, as a training does, is left to it. If the process `ends` with the
    verb, signals that come once the verb is over are passed over: its status stands. Outside the main thread nothing is
    done, for Python cannot.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = 0
    over = False
    asked_to_stop.clear()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if over:
            return
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else signal.SIG_DFL)  # a second Ctrl-C ends
        if asked:
            return  # who stops a group of processes may send both: what is being tidied up is tidied up
        asked = number
        asked_to_stop.set()
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    told = threading.Event()

    def tell(number: int) -> None:
        if not told.is_set() and os.environ.get("RANK", "0") == "0":
            told.set()
            kept = f"; {KEPT[verb]}" if verb in KEPT else ""
            print(f"rerankvpr: {verb}: stopped by {signal.Signals(number).name}{kept}", file=sys.stderr, flush=True)

    ours, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    wakeup_before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        """Sees a signal at once, whatever the main thread does."""
        while number := ours.recv(1):
            if number[0] in before and signal.getsignal(number[0]) in (interrupt, signal.SIG_IGN, signal.SIG_DFL):
                time.sleep(GRACE_S)
                if not over:
                    tell(number[0])
                    os._exit(128 + number[0])

    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
        over = True
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        tell(number)
        leave(128 + number)
    except SystemExit:
        over = True
        raise
    except Exception:
        over = not asked
        if over:
            raise
        tell(asked)  # a library has made another error of the interrupt
        leave(128 + asked)
    finally:
        if over:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if ends else handler)
            wakeup.close()  # ends the watching thread
