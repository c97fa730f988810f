"""Which way through archives is faster, by ranges of bytes or in sequence with spill files: measured, then reckoned."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs.files import partial_of, remove
from data_pipeline.archives.files import Archive, WindowFile
from data_pipeline.archives.members import DamagedArchiveError, members_of
from data_pipeline.storage import RangeReader, is_remote

_MEMBERS, _PIECES, _STRETCH = 32, 32, 2**23
_WINDOWS = (2**16, 2**23)


@dataclass(frozen=True)
class Estimate:
    """Seconds for both ways, from rates of this machine and these archives.

    `photographs` of `photo_bytes` each are used of `members` in `total_bytes`; a member is listed in `list_s` and read
    by itself in `range_s`, both with all threads at work; rates are bytes per second. `window` is how much is best read
    at each member when they are listed.
    """

    photographs: int
    photo_bytes: float
    members: int
    total_bytes: int
    list_s: float
    range_s: float
    sequence_rate: float
    spill_rate: float
    window: int

    @property
    def ranges_s(self) -> float:
        """By ranges: every member is listed, every photograph read by itself."""
        return self.members * self.list_s + self.photographs * self.range_s

    @property
    def sequence_s(self) -> float:
        """In sequence: every byte is read once, photographs are written to spill files and read again."""
        return self.total_bytes / self.sequence_rate + 2 * self.spilled / self.spill_rate

    @property
    def spilled(self) -> int:
        """Bytes of the spill files."""
        return round(self.photographs * self.photo_bytes)

    def __str__(self) -> str:
        listed = f", members listed at {1 / self.list_s:,.0f}/s" if self.list_s else ""
        return (
            f"by ranges {duration(self.ranges_s)} "
            f"({self.photographs:,} photographs at {1 / self.range_s:,.0f}/s{listed}); "
            f"in sequence {duration(self.sequence_s)} ("
            f"{size(self.total_bytes)} at {size(self.sequence_rate)}/s, {size(self.spilled)} of spill files)"
        )


def estimate(
    archives: Sequence[Archive], photographs: int, reader: RangeReader, out: Path, threads: int
) -> Estimate | None:
    """Measures both ways on a few pieces of the first archives; None if they are compressed or hold no photographs.

    `photographs` is how many the table wants, if the archives have them; `threads` read at a time.
    """
    plain = [archive for archive in archives if not archive.is_compressed]
    if not plain:
        return None
    draw = random.Random(0)
    first = plain[0]
    remote = is_remote(first.location)
    stretch = min(_STRETCH, first.size)
    with ThreadPoolExecutor(threads, "measure") as pool:

        def rate(pieces: Sequence[tuple[Archive, int, int]]) -> float:
            """Pieces per second."""
            seconds = _seconds(lambda: list(pool.map(lambda piece: reader.read(piece[0].location, *piece[1:]), pieces)))
            return len(pieces) / seconds

        small = 1 / rate([(first, draw.randrange(max(1, first.size - 512)), min(512, first.size))])
        sequence_rate = stretch * rate([(first, draw.randrange(first.size - stretch + 1), stretch) for _ in range(2)])
        window = int(min(max(small * sequence_rate, _WINDOWS[0]), _WINDOWS[1])) if remote else 4096
        found, list_s = _first_members(first, reader, window)
        if not found:
            return None
        mean = sum(member[1] for member in found) / len(found)
        members = max(1, round(sum(archive.size for archive in plain) / max(512.0, found[-1][0] / len(found))))
        pieces = [
            (archive, draw.randrange(max(1, archive.size - round(mean))), min(round(mean), archive.size))
            for archive in (draw.choice(plain) for _ in range(max(_PIECES, 2 * threads)))
        ]
        range_s = 1 / rate(pieces)
    return Estimate(
        photographs=min(photographs, members),
        photo_bytes=mean,
        members=members,
        total_bytes=sum(archive.size for archive in archives),
        list_s=0.0 if first.is_zip else list_s / min(threads, len(plain)),
        range_s=range_s,
        sequence_rate=sequence_rate,
        spill_rate=_write_rate(out, stretch),
        window=window,
    )


def _first_members(archive: Archive, reader: RangeReader, window: int) -> tuple[list[tuple[int, int]], float]:
    """Where each of the first members ends and how long it is, and the seconds that one took to list."""
    found: list[tuple[int, int]] = []
    began = time.perf_counter()
    try:
        with WindowFile(archive, reader, window) as file:
            for member in members_of(archive, file):
                found.append((member.offset + member.length, member.length))
                if len(found) == _MEMBERS:
                    break
    except DamagedArchiveError:
        pass  # said when it is read as a whole
    return found, (time.perf_counter() - began) / max(1, len(found))


def _write_rate(out: Path, count: int) -> float:
    """Bytes per second that the disk of `out` takes."""
    partial = partial_of(out / "rate")

    def write() -> None:
        with partial.open("wb") as file:
            file.write(os.urandom(count))
            os.fsync(file.fileno())

    try:
        return count / _seconds(write)
    finally:
        remove(partial)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-6)


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """`1.5 GB`, `300 MB`, `12 kB`, of 1,000 each."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
