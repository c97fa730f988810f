"""Disks and quotas that are full: told from other errors, and passed over where a lost line must end nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__
    return False


class LossyStream:
    """A text stream that drops what a full disk does not take, so that a program continues without its log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.why_lost = ""

    def write(self, text: str) -> int:
        """Writes what the disk takes; returns the number of characters given."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what the disk takes."""
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.why_lost = error.strerror or "full"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def give_up(self) -> None:
        """Lets go of what the disk has not taken, so that the process ends without an error; stderr says so."""
        self.flush()
        if self.why_lost:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            print(f"rerankvpr: stdout: {self.why_lost}; lines of it are lost", file=LossyStream(sys.stderr), flush=True)
