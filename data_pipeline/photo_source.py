"""Where the photographs of a listing lie: in a folder of this machine, behind URLs, or inside archives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from configs.reading import read_regular
from data_pipeline.storage import RangeReader

READ_THREADS, RETRY_S = 16, 120.0
_STAT_THREADS = 16


class PhotoSource(Protocol):
    """What `shard` needs of a source; images are rows of a listing. `str()` is how messages name the source."""

    @property
    def read_threads(self) -> int:
        """Threads that fetch photographs ahead of the decoders; 0 where decoders read for themselves."""

    def stats(self, images: pa.Table, on_progress: OnProgress = untold) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of each image (-1 where there is none), and when it changed last, in nanoseconds.

        A source that has to ask a server for them tells `on_progress` how many it has.
        """

    def part(self, images: pa.Table) -> PhotoSource:
        """The source of these images alone, cheap to send to another process."""

    def read(self, image: Mapping[str, Any]) -> bytes:
        """A photograph's file. Raises FileNotFoundError, OSError if it cannot be read, StorageError for an outage."""

    def where(self, image: Mapping[str, Any]) -> str:
        """A photograph's place in the source, for messages."""


@dataclass(frozen=True)
class Folder:
    """Files below a folder of this machine."""

    path: Path
    read_threads: int = 0

    def __str__(self) -> str:
        return str(self.path)

    def stats(
        self,
        images: pa.Table,
        on_progress: OnProgress = untold,  # noqa: ARG002
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return file_stats(self.path, images["file"].to_pylist())

    def part(self, images: pa.Table) -> Folder:  # noqa: ARG002
        return self

    def read(self, image: Mapping[str, Any]) -> bytes:
        return read_regular(self.path / image["file"])

    def where(self, image: Mapping[str, Any]) -> str:
        return str(self.path / image["file"])


def source_of(place: Path | PhotoSource) -> PhotoSource:
    """A listing's source as one."""
    return Folder(place) if isinstance(place, Path) else place


@functools.cache
def shared_reader(retry_s: float) -> RangeReader:
    """This process's reader of remote files for `shard`."""
    return RangeReader(retry_s=retry_s)


def file_stats(source: Path, files: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes of each file (-1 where there is none), and when it changed last, in nanoseconds."""

    def stats(some: list[str]) -> list[tuple[int, int]]:
        return [file_stat(source / file) for file in some]

    step = -(-len(files) // (8 * _STAT_THREADS)) or 1
    with ThreadPoolExecutor(_STAT_THREADS, "stat") as pool:
        parts = pool.map(stats, [files[start : start + step] for start in range(0, len(files), step)])
        sizes, changed_ns = np.array([stat for part in parts for stat in part], dtype=np.int64).reshape(-1, 2).T
    return np.ascontiguousarray(sizes), changed_ns


def file_stat(path: Path) -> tuple[int, int]:
    """A file's bytes and its last change in nanoseconds; (-1, 0) where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return -1, 0
    return stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns)
