"""`metrics.jsonl`: what a training tells, one JSON object a line, appended and never changed.

A line without "event" holds metrics of one step: `{"step": 3, "time_ms": ..., "train/loss": ...}`. The others have an
"event" of start, artifact, evaluation, model or end. All have "time_ms", milliseconds since 1970.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
HELD_LINES = 10_000
_TAIL_BYTES = 1 << 16
_DAMAGED_MS = 366 * 86_400_000  # a line that is so far ahead was not written by a clock


class MetricsLog:
    """Appends lines to a file, from any thread; a disk that takes none costs lines at worst, never an error.

    Lines that could not be written are held in memory, in order, and written before the next one that can be. Beyond
    `held_lines` of them the oldest metrics are dropped and counted. `say` is told once that the disk fails and once
    that it takes lines again. While a log is open its file is locked, see `is_open`.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, held_lines: int = HELD_LINES) -> None:
        self.path, self._say, self._held_lines = path, say, held_lines
        self._held: deque[tuple[bytes, bool]] = deque()
        self._dropped = 0
        self._failing = False
        self._file: int | None = None
        self._closed = False
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record as one line, or holds it."""
        self.append_text(json.dumps(record) + "\n", keep="event" in record)

    def append_text(self, lines: str, *, keep: bool = False) -> None:
        """Writes lines together, or holds them; those to `keep` are held however many follow."""
        with self._lock:
            if not self._closed:
                self._held.append((lines.encode(), not keep))
                self._write_held()

    def flush(self) -> None:
        """Returns once all lines that the disk takes have reached it."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            with self._lock:
                self._write_held()
                if self._file is None:
                    return
                file = os.dup(self._file)  # lines may be appended while the disk is waited for
                opened.callback(os.close, file)
            os.fsync(file)

    def unwritten(self) -> list[dict[str, Any]]:
        """Records that the disk has not taken, oldest first."""
        with self._lock:
            return [json.loads(line) for line, _ in self._held]

    def close(self) -> int:
        """Ends the log; the number of lines that the disk never took."""
        with self._lock:
            self._write_held()
            self._closed = True
            self._shut()
            return len(self._held) + self._dropped

    def _write_held(self) -> None:
        written = 0
        try:
            if self._file is None:
                self._file = self._open()
            while self._held:
                self._write(self._file, self._held[0][0])
                self._held.popleft()
                written += 1
        except OSError as error:
            self._shut()  # a handle may be stale: the next line opens the file again
            if not self._failing:
                self._say(f"{self.path}: {error.strerror or error}; metrics wait in memory, training continues")
            self._failing = True
            self._drop()
            return
        if self._failing:
            lost = f", {self._dropped} lines of metrics are lost" if self._dropped else ""
            self._say(f"{self.path}: the disk takes lines again; {written} written{lost}")
            self._failing, self._dropped = False, 0

    def _drop(self) -> None:
        """Lets the oldest metrics go, and never an event: these are few."""
        while len(self._held) > self._held_lines:
            oldest = next((i for i, (_, is_metrics) in enumerate(self._held) if is_metrics), None)
            if oldest is None:
                return
            del self._held[oldest]
            self._dropped += 1

    def _open(self) -> int:
        """The file, its last line ended: what a killed process left half-written is never joined to a record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # held by another process, or a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                self._write(file, b"\n")
        except OSError:
            os.close(file)
            raise
        return file

    @staticmethod
    def _write(file: int, line: bytes) -> None:
        """One line, whole or not at all."""
        size = os.fstat(file).st_size
        done = os.write(file, line)
        if done < len(line):
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _shut(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


class LogClock:
    """Milliseconds since 1970 for a log's lines: later than any line before, whatever the machine's clock does.

    That is read once; then time passes by the monotonic clock. MLflow's run has the later of two statuses: the end of a
    training whose clock was set back would be earlier than its start, and the run would stay RUNNING.
    """

    def __init__(self, log: Path) -> None:
        self._began_s = time.monotonic()
        self._began_ms = time.time_ns() // 1_000_000
        self._began_ms = max(self._began_ms, _last_ms(log, before_ms=self._began_ms + _DAMAGED_MS) + 1)

    def __call__(self) -> int:
        return self._began_ms + int(1000 * (time.monotonic() - self._began_s))


def _last_ms(log: Path, before_ms: int) -> int:
    """The latest time among a log's last lines, those from `before_ms` on apart; 0 if there is none."""
    latest = 0
    with contextlib.suppress(OSError):
        start = max(0, log.stat().st_size - _TAIL_BYTES)
        for _, _, record in read_records(log, start):
            time_ms = record.get("time_ms") if record else None
            if isinstance(time_ms, int) and latest < time_ms < before_ms:
                latest = time_ms
    return latest


def read_records(path: Path, offset: int = 0) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """(start, end, record) of each whole line from byte `offset` on; the record is None where a line is no record.

    A last line without its end is left out: it is being written, or was cut off.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start, offset = offset, offset + len(line)
            yield start, offset, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def is_open(path: Path) -> bool:
    """Whether a living process writes to this log."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False
