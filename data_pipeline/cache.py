"""A folder of byte ranges with a bounded size, shared by any number of processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from pathlib import Path

from configs.files import PARTIAL, partial_of, remove

_LOCK = "lock"
_STALE_S = 3600.0
_LOOKED_THROUGH = 64  # a process looks through the folder whenever it has written this part of the bound
_KEPT = 0.9


class RangeCache:
    """Keeps byte strings under keys in `folder`, the longest unused removed beyond `max_bytes`.

    A string is written under a name of its own and renamed, so no reader ever sees a part of it. One process at a time
    clears up; the bound is passed by at most 1/64 of it for each process that writes.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"{folder}: a cache of {max_bytes} bytes; give it 1 or more")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_bytes = folder, max_bytes
        self._written = max_bytes  # what lies there from before counts: the first write looks through the folder
        self._lock = threading.Lock()

    def get(self, key: str, length: int) -> bytes | None:
        """The bytes under `key`, or None; whatever is not `length` bytes long is none."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data if len(data) == length else None

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`; nothing happens where it alone is larger than the bound, or the disk is full."""
        if len(data) > self.max_bytes:
            return
        path = self._path(key)
        partial = partial_of(path)
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            remove(partial)
            return
        with self._lock:
            self._written += len(data)
            due = self._written > self.max_bytes // _LOOKED_THROUGH
            if due:
                self._written = 0
        if due:
            self._clear_up()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _clear_up(self) -> None:
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found, total, now = [], 0, time.time()
            for entry in (entry for part in os.scandir(self.folder) if part.is_dir() for entry in os.scandir(part)):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(PARTIAL):
                    if now - stat.st_mtime > _STALE_S:
                        remove(Path(entry.path))
                    continue
                found.append((stat.st_mtime_ns, stat.st_size, entry.path))
                total += stat.st_size
            if total <= self.max_bytes:
                return
            for _, size, path in sorted(found):
                remove(Path(path))
                total -= size
                if total <= _KEPT * self.max_bytes:
                    return
