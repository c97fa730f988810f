"""The first pass over archives: members are listed, and where asked their photographs copied to spill files.

Archives are taken one at a time by whoever is free: threads, and tasks of an array, each by a lock of the archive.
A spill file holds a stretch of an archive, sorted by the places that the photographs go to, so that a tar of the shard
set reads a piece of each.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from configs.files import replacing
from configs.progress import OnProgress, untold
from data_pipeline.archives.chunks import SCHEMA, Chunk, chunks_of, stem, write_chunk
from data_pipeline.archives.files import Archive, WindowFile
from data_pipeline.archives.members import (
    NO_CRC,
    PLAIN,
    DamagedArchiveError,
    Member,
    members_of,
    opened,
    unpack,
)
from data_pipeline.archives.wanted import Wanted, is_photograph
from data_pipeline.folder_lock import FolderLock, LockedError
from data_pipeline.storage import RangeReader, is_remote

MEMBERS_A_CHUNK = 100_000
LOCAL_WINDOW, LOCAL_SEQUENCE, REMOTE_SEQUENCE, SEQUENCE_AHEAD = 4096, 2**19, 4 * 2**20, 2
_WAIT_S = 1.0
_TOLD_EVERY_S = 0.2


@dataclass(frozen=True)
class Gathering:
    """How archives are read: `window` bytes at a time from header to header, or with `spill` from end to end.

    `spill_bytes` are held in memory before a spill file is written, over all `threads` (archives at a time). With
    `need_spill` an archive whose spill files are gone is read again.
    """

    folder: Path
    wanted: Wanted
    reader: RangeReader
    spill: bool
    spill_bytes: int = 256 * 2**20
    window: int = 2**18
    threads: int = 1
    need_spill: bool = True


def gather(archives: Sequence[Archive], how: Gathering, first: int = 0, on_progress: OnProgress = untold) -> None:
    """Lists the members of all archives, beginning with the `first`; returns when all are listed, by whomever.

    Progress counts MB of the archives, with the members as its note. Raises OSError, StorageError for what cannot be
    read; an archive that is cut off or damaged is listed as far as it goes, with its fault.
    """
    how.folder.mkdir(parents=True, exist_ok=True)
    waiting = [*archives[first:], *archives[:first]]
    told, stop = _Told(archives, on_progress), threading.Event()

    def take(archive: Archive) -> Archive | None:
        """The archive, if it is listed at the end."""
        if not _is_done(archive, how):
            try:
                with FolderLock(how.folder, "rerankvpr shard tars", name=f".{stem(archive)}.lock"):
                    _read(archive, how, stop, told)
            except (LockedError, _StoppedError):
                return None
            except BaseException:
                stop.set()
                raise
        told.ended(archive)
        return archive

    with ThreadPoolExecutor(how.threads, "archive") as pool:
        try:
            while waiting:
                listed = {archive.location for archive in pool.map(take, waiting) if archive}
                left = [archive for archive in waiting if archive.location not in listed]
                if len(left) == len(waiting):
                    time.sleep(_WAIT_S)  # others read them
                waiting = left
        finally:
            stop.set()


def _mb(count: int) -> int:
    """MB of 2^20 bytes, a part of one for one."""
    return -(-count >> 20)


class _Told:
    """How far all archives are listed, told every now and then, whichever thread reads them."""

    def __init__(self, archives: Sequence[Archive], on_progress: OnProgress) -> None:
        self._on_progress, self._all = on_progress, sum(archive.size for archive in archives)
        self._passed: dict[str, int] = {}
        self._bytes = self._members = 0
        self._told = time.monotonic()
        self._lock = threading.Lock()

    def passed(self, archive: Archive, member: Member, raw: io.RawIOBase) -> None:
        """Counts a member. In what is compressed as a whole its bytes lie where the file is read."""
        at = raw.tell() if archive.is_compressed else member.offset + member.length
        with self._lock:
            self._members += 1
            self._set(archive, at)
            if time.monotonic() - self._told > _TOLD_EVERY_S:
                self._tell()

    def ended(self, archive: Archive) -> None:
        """Counts an archive that is listed as a whole."""
        with self._lock:
            self._set(archive, archive.size)
            self._tell()

    def _set(self, archive: Archive, at: int) -> None:
        at = max(min(at, archive.size), before := self._passed.get(archive.location, 0))
        self._bytes += at - before
        self._passed[archive.location] = at

    def _tell(self) -> None:
        self._told = time.monotonic()
        done = self._bytes >> 20 if self._bytes < self._all else _mb(self._all)
        self._on_progress(done, _mb(self._all), f"{self._members:,} members" if self._members else "")


class _StoppedError(Exception):
    """Another archive failed, or the user stopped the run."""


def _is_done(archive: Archive, how: Gathering) -> bool:
    return any(chunk.is_last for chunk in chunks_of(how.folder, archive, need_spill=how.need_spill))


def _read(archive: Archive, how: Gathering, stop: threading.Event, told: _Told) -> None:
    """Lists an archive from where its last chunk ended."""
    done = list(chunks_of(how.folder, archive, need_spill=how.need_spill))
    if done and done[-1].is_last:
        return
    spill = how.spill or archive.is_compressed
    window, ahead = how.window, 0
    if spill or archive.is_zip:
        window = REMOTE_SEQUENCE if is_remote(archive.location) else LOCAL_SEQUENCE
        ahead = SEQUENCE_AHEAD if spill else 0
    elif not is_remote(archive.location):
        window = LOCAL_WINDOW
    chunk = _Open(archive, how, len(done), done[-1].after if done else 0, spill)
    with WindowFile(archive, how.reader, window, ahead) as raw:
        file = opened(archive, raw)
        try:
            for member in members_of(archive, file, chunk.start):
                if stop.is_set():
                    raise _StoppedError
                stored = None
                if chunk.takes(member):
                    file.seek(member.offset)
                    stored = file.read(member.length) or b""
                chunk.add(member, stored)
                told.passed(archive, member, raw)
                if chunk.is_full:
                    chunk = chunk.write(is_last=False)
        except DamagedArchiveError as error:
            chunk.write(is_last=True, fault=str(error))
        else:
            chunk.write(is_last=True)


class _Open:
    """A chunk that is being filled."""

    def __init__(self, archive: Archive, how: Gathering, number: int, start: int, spill: bool) -> None:
        self.archive, self.how, self.number, self.start, self.spill = archive, how, number, start, spill
        self.after = start
        self._members: list[Member] = []
        self._photos: dict[int, bytes] = {}
        self._held = 0
        self._others: Counter[str] = Counter()

    @property
    def is_full(self) -> bool:
        """Whether it holds as much as memory may."""
        return self._held >= self.how.spill_bytes // self.how.threads or len(self._members) >= MEMBERS_A_CHUNK

    def takes(self, member: Member) -> bool:
        """Whether a member's bytes go to the spill file, if the table names it."""
        if not self.spill or member.why:
            return False
        row = self._row(member)
        return row >= 0 and int(self.how.wanted.rank[row]) >= 0

    def _row(self, member: Member) -> int:
        return int(self.how.wanted.rows([member.name])[0])

    def add(self, member: Member, stored: bytes | None) -> None:
        """Takes a member over, and its bytes if they are to be spilled."""
        self.after = member.after
        if not is_photograph(member.name) and (self.how.wanted.by_stem or self._row(member) < 0):
            self._others[PurePosixPath(member.name).suffix.lower() or "no suffix"] += 1
            return
        why = member.why
        if stored is not None:
            try:
                stored = unpack(stored, member.method, member.size, member.crc32)
            except ValueError as error:
                why, stored = str(error), None
        if stored is not None:
            self._photos[len(self._members)] = stored
            self._held += len(stored)
        self._members.append(member if why == member.why else _unusable(member, why))

    def write(self, *, is_last: bool, fault: str = "") -> _Open:
        """Writes it, and gives the next one."""
        rows = self.how.wanted.rows([member.name for member in self._members]).tolist()
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        spill = f"{stem(self.archive)}-{self.number:05d}.spill" if self._photos else ""
        offsets: dict[int, int] = {}
        if spill:
            with replacing(self.how.folder / spill, durable=True) as partial, partial.open("wb") as file:
                for number in sorted(self._photos, key=lambda number: int(self.how.wanted.rank[rows[number]])):
                    offsets[number] = file.tell()
                    file.write(self._photos[number])
        for number, (member, row) in enumerate(zip(self._members, rows, strict=True)):
            spilled = number in offsets
            columns["row"].append(row)
            columns["name"].append(member.name.encode(errors="replace").decode())
            columns["spilled"].append(spilled)
            columns["offset"].append(offsets[number] if spilled else member.offset)
            columns["length"].append(member.size if spilled else member.length)
            columns["size"].append(member.size)
            columns["method"].append(PLAIN if spilled else member.method)
            columns["crc32"].append(NO_CRC if spilled else member.crc32)
            columns["why"].append(member.why)
        held, others = self._held if spill else 0, dict(self._others)
        chunk = Chunk(
            self.archive, self.number, self.start, self.after, is_last, fault, spill, spill_bytes=held, others=others
        )
        write_chunk(self.how.folder, chunk, columns)
        return _Open(self.archive, self.how, self.number + 1, self.after, self.spill)


def _unusable(member: Member, why: str) -> Member:
    return Member(member.name, member.offset, member.length, member.size, member.after, member.method, why=why)


def remove_spill(folder: Path) -> None:
    """Removes the spill files, once no tar of the set needs them."""
    for path in folder.glob("*.spill"):
        with contextlib.suppress(OSError):
            path.unlink()
