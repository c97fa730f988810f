"""How a command ends on an error: one line, from the rank that knows it, whatever was raised."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.full_disk import FULL
from configs.plugins import described
from configs.reading import NO_THREAD, is_out_of_memory, reason, said_by, shown
from configs.secrets import without_secrets

USER_ERRORS = (ValueError, OSError)
OTHERS_WAIT_S = 3.0
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
LONGEST_LINE, MOST_LINES = 2000, 40
asked_to_stop = threading.Event()  # by a signal that ends the verb; see launch.interrupted


class TrainingError(RuntimeError):
    """A training that must stop; the text says why, where, and what to do."""


@contextmanager
def one_line_errors(*extra: type[Exception], folder: Path | None = None) -> Iterator[None]:
    """Ends the process on an error: a line on stderr, never a traceback.

    Status 2 for mistakes of the user (USER_ERRORS and `extra` kinds), which may have several lines, one a fault. All
    else is status 1 and a line with the error's kind and the place in our code; its traceback goes to a file in
    `folder`, or among the temporary files, which the line names. RERANKVPR_TRACEBACK=1 shows any of them at once.

    Where all ranks make the same mistake, rank 0 speaks and the launcher ends the others while they wait; a mistake
    that only another rank meets is reported by that rank. A rank of several leaves at once: threads or collectives that
    still wait would hold it, and with it all others.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            raise  # where the reader of our output has seen enough it is no error: the entry point knows
        if asked_to_stop.is_set():
            raise  # what an interrupted import leaves makes errors of any kind: the verb says what stopped it
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if rank:
            time.sleep(OTHERS_WAIT_S)
        prefix = f"rerankvpr: rank {rank}: " if rank and world > 1 else "rerankvpr: "
        expected = isinstance(error, (*USER_ERRORS, *extra))
        for line in lines_of(error) if expected else [_unexpected(error, folder, rank)]:
            print(prefix + without_secrets(line), file=sys.stderr, flush=True)
        if os.environ.get("RERANKVPR_TRACEBACK"):
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
        leave(2 if expected else 1)


def leave(status: int) -> None:
    """Ends the process: at once where it is one of several ranks, whose threads or collectives may still wait."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, or closed: nobody can be told
            if stream is sys.stdout:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(status) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else sys.exit(status)


def lines_of(error: Exception) -> list[str]:
    """What a user reads of an error: bounded lines, one a fault."""
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        return [f"{error.strerror}: stdout, or a file that was being written, is not whole"]
    lines = without_secrets(said_by(error)).splitlines() or [type(error).__name__]
    more = [f"and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
    return [_middle_out(line) for line in lines[:MOST_LINES]] + more


def _middle_out(line: str) -> str:
    """A line of bounded length: what is wrong and what would be right stand at its ends."""
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


def _unexpected(error: Exception, folder: Path | None, rank: int) -> str:
    """One line on an error that is not the user's: what it means where that is known, else where it was raised."""
    text = str(error)
    if is_out_of_memory(error):
        threads = ", or at the system's limit of threads" if NO_THREAD in text else ""
        what = f"out of memory{threads} ({reason(error)})"
    elif any(sign in text for sign in LOST_PEER):
        what = f"another rank is gone ({reason(error)}); the first line of its own log says why"
    else:
        what = described(error)
    kept = _keep_traceback(folder, rank)
    return f"{what}, at {_place(error)}; {f'{kept} has the traceback' if kept else 'RERANKVPR_TRACEBACK=1 shows more'}"


def _place(error: BaseException) -> str:
    """File, line and function of our code that was last on the way to an error."""
    home = str(Path(__file__).resolve().parent.parent)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(home) and f"{os.sep}site-packages{os.sep}" not in f.filename]
    last = (ours or frames)[-1]
    return f"{shown(os.path.relpath(last.filename, home) if ours else last.filename)}:{last.lineno} {last.name}"


def _keep_traceback(folder: Path | None, rank: int) -> str:
    """Writes the traceback of the error being handled to a file and returns its name; empty where no disk takes it."""
    for place in (folder, Path(tempfile.gettempdir())):
        if place is None or not place.is_dir():
            continue
        file = place / f"rerankvpr-error-rank-{rank:05d}-{os.getpid()}.txt"
        try:
            file.write_text(without_secrets(traceback.format_exc()))
        except OSError:
            continue
        return str(file)
    return ""
