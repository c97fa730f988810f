"""Photographs inside archives and spill files as a source of `shard`: each a range of bytes, by its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from data_pipeline.archives.members import unpack
from data_pipeline.photo_source import RETRY_S, shared_reader
from data_pipeline.storage import is_remote

NOWHERE = -1
NUMBERS = ("offset", "length", "size", "method", "crc32")  # of a `Member`


@dataclass(frozen=True)
class ArchivedPhotos:
    """Photographs by the line of the table that names them.

    `lines` (int64 [N], ascending); `container` (int32 [N]) is a number in `containers` (locations of archives and spill
    files, which changed at `changed_ns`), NOWHERE for a row without a member; `numbers` (int64 [N, 5]) are the members'
    NUMBERS. `shown` is what messages call the source.
    """

    shown: str
    containers: tuple[str, ...]
    changed_ns: NDArray[np.int64]
    lines: NDArray[np.int64]
    container: NDArray[np.int32]
    numbers: NDArray[np.int64]
    threads: int = 0
    retry_s: float = RETRY_S

    def __str__(self) -> str:
        return self.shown

    @property
    def read_threads(self) -> int:
        """Threads that fetch ranges; none for files of this machine."""
        return self.threads if any(map(is_remote, self.containers)) else 0

    def stats(
        self,
        images: pa.Table,
        on_progress: OnProgress = untold,  # noqa: ARG002
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of each image (-1 where there is none), and when its archive changed last."""
        at = self._at(images["row"].to_numpy())
        there = self.container[at] != NOWHERE
        changed_ns = np.where(there, self.changed_ns[self.container[at]], 0) if len(self.containers) else at * 0
        return np.where(there, self.numbers[at, NUMBERS.index("size")], -1), changed_ns

    def part(self, images: pa.Table) -> ArchivedPhotos:
        """The photographs of these images alone."""
        at = np.sort(self._at(images["row"].to_numpy()))
        used, inverse = np.unique(self.container[at], return_inverse=True)
        if has_gaps := len(used) > 0 and used[0] == NOWHERE:
            used = used[1:]
        container = (inverse.reshape(-1) - int(has_gaps)).astype(np.int32)
        return replace(
            self,
            containers=tuple(self.containers[number] for number in used.tolist()),
            changed_ns=self.changed_ns[used],
            lines=self.lines[at],
            container=container,
            numbers=self.numbers[at],
        )

    def read(self, image: Mapping[str, Any]) -> bytes:
        """A photograph's file. Raises FileNotFoundError, StorageError, ValueError for a damaged member."""
        at = int(self._at(np.array([image["row"]]))[0])
        if self.container[at] == NOWHERE:
            raise FileNotFoundError(self.where(image))
        location = self.containers[self.container[at]]
        offset, length, size, method, crc32 = self.numbers[at].tolist()
        stored = shared_reader(self.retry_s).read(location, offset, length) if length else b""
        return unpack(stored, method, size, crc32)

    def where(self, image: Mapping[str, Any]) -> str:
        """The member's name, with its archive if it has one."""
        at = int(self._at(np.array([image["row"]]))[0])
        inside = "" if self.container[at] == NOWHERE else f"{self.containers[self.container[at]]}: "
        return f"{inside}{image['file']}"

    def _at(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.lines, lines)
