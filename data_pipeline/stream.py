"""The places of tars that are read whole, one after the other, by webdataset's iteration over a tar's members.

Not by its `gopen`: that hands an address to curl, whose second try into a pipe begins the tar again, and which shows
the address, credentials and all, to everyone on the machine. Nor by its splits: they deal tars to ranks by turns, so
that the batch of a step would depend on the number of ranks; the lanes of the plan stand in for both.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Protocol

import numpy as np

from configs.traced import beside
from data_pipeline.index import PlaceRange
from data_pipeline.plan import EpochPlan, Int64
from data_pipeline.storage import RangeReader, StorageError, ignored_range, is_remote, open_tar
from data_pipeline.tars import BLOCK, padding

REQUEST_BYTES = 16 * 2**20  # of a tar on a server: some 200 places a request
_BUFFER_BYTES = 2**20


@dataclass
class StreamCounts:
    """What streams have read: bytes of tars, those of places that were asked for, tars begun."""

    read_bytes: int = 0
    used_bytes: int = 0
    tars: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, read: int, used: int) -> None:
        """Counts a tar that is begun, from its first wanted place to the end of its last."""
        with self._lock:
            self.read_bytes += read
            self.used_bytes += used
            self.tars += 1

    @property
    def unused_bytes(self) -> int:
        """Headers, descriptions, and places that are held out, not due in this epoch, or other ranks'."""
        return self.read_bytes - self.used_bytes


class Places(Protocol):
    """What knows where places are."""

    def place_range(self, place_id: int) -> PlaceRange:
        """Where the views of a place lie."""


class Reading:
    """The bytes of one place of a step, once its lane has come to them."""

    def __init__(self, places: Future[list[bytes]], number: int) -> None:
        self._places, self._number = places, number

    def result(self) -> bytes:
        """The bytes; see `Future.result`. Can be asked for once."""
        places = self._places.result()
        data, places[self._number] = places[self._number], b""
        return data

    def cancel(self) -> bool:
        """See `Future.cancel`."""
        return self._places.cancel()


class TarStreams:
    """The lanes of an epoch that a rank takes places from, each read by a thread of its own."""

    def __init__(
        self,
        places: Places,
        plan: EpochPlan,
        steps: Sequence[int],
        *,
        rank: int,
        world_size: int,
        reader: RangeReader,
        threads: list[ThreadPoolExecutor],
        stop: threading.Event,
        counts: StreamCounts,
    ) -> None:
        """`steps`, ascending, are those that will be asked for; `threads` has one executor for each lane."""
        assert plan.reading_LM is not None
        share = plan.places_SP.shape[1] // world_size
        of_lane = plan.places_SP.shape[1] // len(plan.reading_LM)
        self._lanes: list[tuple[slice, _Lane, ThreadPoolExecutor]] = []  # with the lane's part of this rank's places
        for lane, reading_M in enumerate(plan.reading_LM):
            low = max(rank * share, lane * of_lane)
            high = min((rank + 1) * share, (lane + 1) * of_lane)
            if low < high:
                needed = plan.places_SP[np.asarray(steps, np.int64), low:high]
                reading = _Lane(places, reading_M, needed.reshape(-1), reader, stop, counts)
                self._lanes.append((slice(low - rank * share, high - rank * share), reading, threads[lane]))

    def start(self, places: Int64) -> list[Reading]:
        """The readings of a step's places (int64 [P/W]); steps are asked for in the order that was announced."""
        readings: list[Reading] = []
        for part, lane, thread in self._lanes:
            wanted = places[part].tolist()
            future = thread.submit(lane.take, wanted)
            readings += [Reading(future, number) for number in range(len(wanted))]
        return readings


class _Lane:
    """Reads a lane's tars and keeps the needed places until they are taken."""

    def __init__(
        self,
        places: Places,
        reading_M: Int64,
        needed: Int64,
        reader: RangeReader,
        stop: threading.Event,
        counts: StreamCounts,
    ) -> None:
        kept = reading_M[np.isin(reading_M, needed)]
        self._stop = stop
        self._coming = _read_places(places, kept, reader, stop, counts)
        self._read: dict[int, bytes] = {}

    def take(self, wanted: list[int]) -> list[bytes]:
        for place in wanted:
            while place not in self._read:
                if self._stop.is_set():
                    raise CancelledError
                with beside("read a place"):
                    came, data = next(self._coming)
                self._read[came] = data
        return [self._read.pop(place) for place in wanted]


def _read_places(
    places: Places, wanted: Int64, reader: RangeReader, stop: threading.Event, counts: StreamCounts
) -> Iterator[tuple[int, bytes]]:
    """The wanted places, which are in the order of tars, each with its bytes as a range read gives them.

    Bytes that a damaged tar does not give are zeros, which differ from the index's crc32.
    """
    found = ((int(place), places.place_range(int(place))) for place in wanted)
    for _, group in itertools.groupby(found, key=lambda one: one[1].location):
        of_tar = list(group)
        ranges = [planned for _, planned in of_tar]
        start, end = max(0, ranges[0].start - BLOCK), ranges[-1].start + ranges[-1].length
        counts.add(read=end - start, used=sum(planned.length for planned in ranges))
        with closing(open_stream(ranges[0].location, start, end, reader, stop)) as stream:
            for (place, _), data in zip(of_tar, _cut(stream, start, ranges), strict=True):
                yield place, data


def _cut(stream: BinaryIO | _ServerTar, start: int, ranges: list[PlaceRange]) -> Iterator[bytes]:
    """The bytes of each place, out of the members of a tar from byte `start`, where one begins."""
    members = _members(stream, start)
    at, member = next(members, (-1, b""))
    for planned in ranges:
        data = bytearray(planned.length)
        for offset, size in zip(planned.offsets.tolist(), planned.sizes.tolist(), strict=True):
            while 0 <= at < planned.start + offset:
                at, member = next(members, (-1, b""))
            if at == planned.start + offset and len(member) == size:
                data[offset : offset + size] = member
        yield bytes(data)


def _members(stream: BinaryIO | _ServerTar, start: int) -> Iterator[tuple[int, bytes]]:
    """Where the content of each member is in the tar, and the content; fewer where the tar is damaged or cut."""
    from webdataset.tariterators import tar_file_iterator  # with all of the library, which range reads do without

    at = start
    members = tar_file_iterator(stream, skip_meta=None)
    while True:
        try:
            member = next(members, None)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - tarfile's and decompressors' word for damage; what follows is not given
            if isinstance(stream, _ServerTar) and stream.fault:
                raise stream.fault() from None
            return
        if member is None:
            return
        data: bytes = member["data"]
        yield at + BLOCK, data
        at += BLOCK + len(data) + len(padding(len(data)))


class _ServerTar:
    """Bytes `start` to `end` of a tar on a server, in order, a request for each REQUEST_BYTES."""

    def __init__(self, location: str, start: int, end: int, reader: RangeReader, stop: threading.Event) -> None:
        self._location, self._at, self._end, self._reader, self._stop = location, start, end, reader, stop
        self._had, self._used = b"", 0
        self.fault: Callable[[], OSError] | None = None  # webdataset writes into an error that passes through it

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end."""
        if self._used == len(self._had):
            self._had, self._used = self._request(), 0
        data = self._had[self._used : self._used + size]
        self._used += len(data)
        return data

    def _request(self) -> bytes:
        length = min(REQUEST_BYTES, self._end - self._at)
        if length <= 0:
            return b""
        try:
            data = self._reader.read(self._location, self._at, length, stop=self._stop)
        except StorageError as error:
            if not ignored_range(error):
                self.fault = partial(StorageError, str(error))
                raise
            data = self._reader.read_file(self._location)[self._at : self._end]
        except FileNotFoundError as error:
            self.fault = partial(FileNotFoundError, str(error))
            raise
        self._at += len(data)
        return data

    def close(self) -> None:
        """Nothing is held open."""


def open_stream(
    location: str, start: int, end: int, reader: RangeReader, stop: threading.Event
) -> BinaryIO | _ServerTar:
    """Bytes `start` to `end` of a tar, to be read in order; of this machine's tars more can be read.

    A server that ignores ranges gives each tar whole, which this process then holds. Raises OSError.
    """
    if is_remote(location):
        return _ServerTar(location, start, end, reader, stop)
    file = os.fdopen(open_tar(location), "rb", buffering=_BUFFER_BYTES)
    file.seek(start)
    return file
