"""Archives as files: what the words of a command name, and their bytes in windows, from disk or a server."""

from __future__ import annotations

import glob
import io
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from configs.secrets import without_secrets
from data_pipeline.photo_source import file_stat
from data_pipeline.storage import RangeReader, is_remote

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz")
SUFFIXES = (".tar", ".zip", *COMPRESSED)
EXPECTED = (
    "tars (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz) or zips, a folder of them, or names such as images_{000..499}.tar"
)


@dataclass(frozen=True)
class Archive:
    """A tar or zip: a path of this machine or a URL, its bytes, and when it changed last in nanoseconds."""

    location: str
    size: int
    changed_ns: int

    @property
    def name(self) -> str:
        """The last part of its location."""
        return self.shown.rpartition("/")[2]

    @property
    def shown(self) -> str:
        """Its location without secrets: the same for an address that was signed again."""
        return without_secrets(self.location, is_address=True) if is_remote(self.location) else self.location

    @property
    def is_compressed(self) -> bool:
        """Whether it is compressed as a whole, so that it can be read from its start alone."""
        return self.name.lower().endswith(COMPRESSED)

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip."""
        return self.name.lower().endswith(".zip")


def find_archives(words: Sequence[str], reader: RangeReader) -> list[Archive]:
    """The archives that paths, folders, patterns and URLs name, in that order; those of a folder sorted by name.

    `{000..499}` and `{a,b}` expand in paths and URLs, `*` and `?` in paths. Raises FileNotFoundError for a word that
    names none, ValueError for what is no archive by its name or is named twice.
    """
    locations: list[str] = []
    for word in words:
        try:
            expanded = list(braceexpand(word))
        except ValueError as error:
            raise ValueError(f"{word}: {error}") from error
        for one in expanded:
            locations += _below(one, reader)
    seen: set[str] = set()
    for location in locations:
        if not _plain(location).lower().endswith(SUFFIXES):
            raise ValueError(f"{_plain(location)}: no archive by its name; expected {EXPECTED}")
        if location in seen:
            raise ValueError(f"{_plain(location)}: named twice")
        seen.add(location)
    with ThreadPoolExecutor(16, "stat") as pool:
        return list(pool.map(lambda location: _archive(location, reader), locations))


def _plain(location: str) -> str:
    return Archive(location, 0, 0).shown


def _below(word: str, reader: RangeReader) -> list[str]:
    if is_remote(word):
        if _plain(word).lower().endswith(SUFFIXES) or word.startswith(("http://", "https://")):
            return [word]
        files, _ = reader.folder(word)
        found = [f"{word.rstrip('/')}/{name}" for name in sorted(files) if name.lower().endswith(SUFFIXES)]
    elif Path(word).is_dir():
        names = (path.name for path in Path(word).iterdir() if path.is_file() and not path.name.startswith("."))
        found = [str(Path(word) / name) for name in sorted(names) if name.lower().endswith(SUFFIXES)]
    elif not Path(word).exists() and glob.has_magic(word):
        found = sorted(glob.glob(word))  # noqa: PTH207 - patterns may be absolute
    else:
        return [word]
    if not found:
        raise FileNotFoundError(f"{word}: no archives there; expected {EXPECTED}")
    return found


def _archive(location: str, reader: RangeReader) -> Archive:
    if is_remote(location):
        remote = reader.stat(location)
        return Archive(location, remote.size, remote.changed_ns)
    size, changed_ns = file_stat(Path(location))
    if size < 0:
        raise FileNotFoundError(f"{location}: no such file; expected {EXPECTED}")
    return Archive(str(Path(location).absolute()), size, changed_ns)


class WindowFile(io.RawIOBase):
    """An archive's bytes as a file, read in windows; `ahead` windows are fetched before they are asked for."""

    def __init__(self, archive: Archive, reader: RangeReader, window: int, ahead: int = 0) -> None:
        self._archive, self._reader, self._window = archive, reader, window
        self._at = self._start = 0
        self._data = b""
        self._coming: deque[tuple[int, Future[bytes]]] = deque()
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(ahead, "window") if ahead else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._archive.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._archive.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        parts = []
        while size > 0:
            inside = self._at - self._start
            if not 0 <= inside < len(self._data):
                self._load(self._at)
                inside = self._at - self._start
            part = self._data[inside : inside + size]
            if not part:  # the file is shorter than it was
                break
            parts.append(part)
            self._at += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _load(self, start: int) -> None:
        while self._coming and not self._coming[0][0] <= start < self._coming[0][0] + self._window:
            self._coming.popleft()[1].cancel()
        if self._coming:
            self._start, future = self._coming.popleft()
            self._data = future.result()
        else:
            self._start, self._data = start, self._fetch(start)
        if self._pool:
            after = self._coming[-1][0] + self._window if self._coming else self._start + self._window
            while len(self._coming) < self._ahead and after < self._archive.size:
                self._coming.append((after, self._pool.submit(self._fetch, after)))
                after += self._window

    def _fetch(self, start: int) -> bytes:
        length = min(self._window, self._archive.size - start)
        return self._reader.read(self._archive.location, start, length) if length > 0 else b""

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()
