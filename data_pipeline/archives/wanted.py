"""Which members of archives a table names, by hash: 16 bytes a row beside the table itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.archives.members import plain_name
from data_pipeline.formats import HEIC_SUFFIXES, SUFFIXES


@dataclass(frozen=True)
class Wanted:
    """Rows of a table as the names of members.

    `keys` are what rows call their member: its whole name, or with `by_stem` the last part without its suffix, as
    GLDv2's and OSV-5M's ids. `rank` (int64 [N]) is a row's place in the listing, -1 if its place has too few images.
    """

    keys: pa.Array
    by_stem: bool
    rank: NDArray[np.int64]
    hashes: NDArray[np.uint64]  # sorted
    order: NDArray[np.int64]  # the row of each

    @property
    def digest(self) -> str:
        """Tells tables with other rows, or other places, apart."""
        digest = hashlib.sha256(f"1 {self.by_stem}".encode())
        for array in (self.hashes, self.order, self.rank):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        """The row of each member, -1 where no row names it (int64 [n])."""
        keys = [key_of(name) if self.by_stem else name for name in names]
        hashes = _hashes(keys)
        first = np.searchsorted(self.hashes, hashes)
        rows = np.full(len(keys), -1, dtype=np.int64)
        for number in np.flatnonzero(first < len(self.hashes)).tolist():
            at = int(first[number])
            while at < len(self.hashes) and self.hashes[at] == hashes[number]:
                row = int(self.order[at])
                if self.keys[row].as_py() == keys[number]:
                    rows[number] = row
                    break
                at += 1
        return rows


def wanted_members(keys: pa.Array, by_stem: bool, rank: NDArray[np.int64]) -> Wanted:
    """The members that rows name; `keys` (text) are unique."""
    hashes = _hashes(keys.to_pylist())
    order = np.argsort(hashes, kind="stable")
    return Wanted(keys, by_stem, rank, hashes[order], order)


def is_photograph(name: str) -> bool:
    """Whether a member is a photograph by its name."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES | HEIC_SUFFIXES


def key_of(name: str) -> str:
    """The id that a member's name holds: its last part without the suffix."""
    return name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]


def names_whole(keys: pa.Array) -> bool:
    """Whether a column holds whole names of members, not ids: by its first cells."""
    some = [str(key) for key in keys[:64].to_pylist()]
    return any("/" in plain_name(key) or is_photograph(key) for key in some)


def _hashes(keys: Sequence[str]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)
