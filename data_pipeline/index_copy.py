"""The columns of a large index in files that all processes of a machine map: one copy in memory, open at once.

A copy is a folder named after its `index.parquet` (digest, size, time), so another index never meets it. It appears
whole, written by whoever comes first under a lock. The columns that the epoch plan is made of are checked when it is
opened, the others block by block as places are looked up.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.files import partial_of, remove, remove_abandoned, write_whole
from configs.reading import reason
from configs.secrets import without_secrets
from data_pipeline.index import INDEX, INDEX_DIGEST, IndexFile, ShardIndex, checked_metadata
from data_pipeline.index_rows import DTYPES, PER_IMAGE
from data_pipeline.storage import RangeReader, StorageError, is_remote, join

SHARED_FROM_IMAGES = 2**20  # below, each process reads the table itself, in a tenth of a second
ABOUT = "about.json"

_FORMAT = 1
_CHECKED_ROWS = 2**16
_BYTES_PER_IMAGE, _BYTES_PER_PLACE = 20, 32
_COLUMNS = DTYPES | {"num_views": np.dtype(np.int64)}

Columns = dict[str, NDArray[Any]]


class DamagedCopyError(ValueError):
    """A copy whose files are not what was written."""


def open_index(
    location: str,
    reader: RangeReader | None = None,
    *,
    folder: Path | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ShardIndex:
    """The index of the shard set at `location`, mapped from this machine's copy of it if it is large.

    Copies are in `folder`, by default one of this user's in the system's temporary folder. A copy that is absent or
    damaged is written; where it cannot be, the index is read into this process's own memory and `on_note` gets a line.
    Raises what `read_index` raises.
    """
    reader = reader or RangeReader()
    key = _key(location, reader)
    if key is None or _is_small(location, reader):
        return IndexFile(location, reader).read()
    found, file, copy = None, None, (folder or _own_folder()) / key
    if folder or _is_private(copy.parent):
        with suppress(OSError, DamagedCopyError):  # which are met again under the lock
            if found := _open_copy(copy, location):
                return found
    try:
        _make_folder(copy.parent, private=folder is None)
        with _locked(copy.with_suffix(".lock")):
            try:
                if found := _open_copy(copy, location):
                    return found
            except DamagedCopyError as error:
                _say(f"{error}; it is written again", on_note)
            file = IndexFile(location, reader)  # one process of the machine checks its digest, or asks the server
            if file.num_rows >= SHARED_FROM_IMAGES:
                _write_copy(copy, file)
                found = _open_copy(copy, location)
    except (StorageError, DamagedCopyError):
        raise
    except OSError as error:
        file = file or IndexFile(location, reader)
        if file.num_rows >= SHARED_FROM_IMAGES:
            size = (file.metadata.images * _BYTES_PER_IMAGE + file.metadata.places * _BYTES_PER_PLACE) / 2**30
            _say(
                f"{file.name}: no copy for all processes of this machine in {copy.parent} ({reason(error)}); each "
                f"holds {size:.2g} GB of its own; name a folder that can be written to in data.index_cache",
                on_note,
            )
    return found or file.read()


def _is_small(location: str, reader: RangeReader) -> bool:
    """Whether an index of this machine has few rows; the rest is not looked at, and of a server's nothing is known."""
    return not is_remote(location) and IndexFile(location, reader, check_digest=False).num_rows < SHARED_FROM_IMAGES


def _key(location: str, reader: RangeReader) -> str | None:
    """The name of the copy of an index; None where the index has no digest."""
    try:
        said = reader.read_file(join(location, INDEX_DIGEST))
        about = location if is_remote(location) else _stamp(Path(location) / INDEX)
    except FileNotFoundError:
        return None
    return hashlib.sha256(f"{_FORMAT} {about} ".encode() + said).hexdigest()[:32]


def _stamp(path: Path) -> str:
    """What of a file changes when it is written; damage to an index that was copied before is found by it."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _own_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"rerankvpr-{os.getuid()}" / "index"


def _make_folder(home: Path, *, private: bool) -> None:
    """Makes the folder of copies. Raises PermissionError for a private one that others may write to."""
    if not private:
        home.mkdir(parents=True, exist_ok=True)
        return
    for folder in (home.parent, home):
        folder.mkdir(exist_ok=True, mode=0o700)
    if not _is_private(home):
        raise PermissionError(f"{home} belongs to another user, or others may write to it")


def _is_private(home: Path) -> bool:
    """Whether the folder of copies, and the one that it is in, are this user's and nobody else may write to them."""
    with suppress(FileNotFoundError):
        stats = [folder.stat() for folder in (home.parent, home)]
        return all(stat.st_uid == os.getuid() and not stat.st_mode & 0o022 for stat in stats)
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock, where the file system has some; elsewhere two may write a copy, and one of them stays."""
    with path.open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_copy(folder: Path, file: IndexFile) -> None:
    """Writes the columns of an index to `folder`, which appears whole. Raises OSError, and ValueError for bad rows."""
    remove_abandoned(folder)
    partial = partial_of(folder)
    cities: list[str] = []
    try:
        partial.mkdir()
        with ExitStack() as stack:
            out = {name: stack.enter_context((partial / name).open("wb")) for name in _COLUMNS}
            last = np.empty(0, np.int64)
            for block in file.blocks(cities):
                for name, part in block.items():
                    out[name].write(np.ascontiguousarray(part, DTYPES[name]).data)
                starts = np.append(last, block["place_starts"])
                out["num_views"].write(np.diff(starts).data)  # of a place when the next one begins
                last = starts[-1:]
            images = file.metadata.images
            out["num_views"].write((images - last).data)
            out["place_starts"].write(np.array([images], np.int64).data)
        lengths = {name: (partial / name).stat().st_size // dtype.itemsize for name, dtype in _COLUMNS.items()}
        columns = _map(partial, lengths)
        about = {
            "metadata": file.raw_metadata,
            "cities": cities,
            "columns": {name: {"length": lengths[name], "crc32": _checksums(columns[name])} for name in columns},
        }
        body = json.dumps(about, separators=(",", ":")).encode()
        write_whole(partial / ABOUT, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        _put_in_place(partial, folder)
    finally:
        remove(partial)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Renames a copy to its name, instead of a damaged one that has it."""
    old = partial_of(folder)
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another machine was first
            raise
    remove(old)


def _open_copy(folder: Path, location: str) -> ShardIndex | None:
    """The index in a copy; None where there is none. Raises DamagedCopyError, and OSError."""
    try:
        digest, _, body = (folder / ABOUT).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedCopyError(f"{folder}: its {ABOUT} is damaged")
    about = json.loads(body)
    checksums = {name: np.array(column["crc32"], np.uint32) for name, column in about["columns"].items()}
    columns = _map(folder, {name: column["length"] for name, column in about["columns"].items()})
    _check_now(folder, columns, checksums)
    name = without_secrets(join(location, INDEX), is_address=True)
    return ShardIndex(
        location=location,
        metadata=checked_metadata(about["metadata"], location, name),
        cities=about["cities"],
        check_rows=_RowChecks(folder, columns, checksums),
        **columns,
    )


def _map(folder: Path, lengths: dict[str, int]) -> Columns:
    """The columns as read-only arrays, whose pages are read when they are touched."""
    columns = {}
    for name, dtype in _COLUMNS.items():
        size = (folder / name).stat().st_size
        if size != lengths[name] * dtype.itemsize:
            raise DamagedCopyError(f"{folder}: {name} has {size} bytes, not {lengths[name] * dtype.itemsize}")
        columns[name] = np.asarray(np.memmap(folder / name, dtype, mode="r", shape=(lengths[name],)))
    return columns


def _checksums(column: NDArray[Any]) -> list[int]:
    """The CRC32 of each `_CHECKED_ROWS` elements."""
    return [zlib.crc32(column[start : start + _CHECKED_ROWS].data) for start in range(0, len(column), _CHECKED_ROWS)]


def _check_now(folder: Path, columns: Columns, checksums: Columns) -> None:
    """Checks the columns that have an element for each place."""
    names = [name for name in columns if name not in PER_IMAGE]
    with ThreadPoolExecutor(len(names)) as pool:
        for name, found in zip(names, pool.map(lambda name: _checksums(columns[name]), names), strict=True):
            if not np.array_equal(np.array(found, np.uint32), checksums[name]):
                raise DamagedCopyError(f"{folder}: its {name} is damaged")


class _RowChecks:
    """Checks the columns of images a block at a time, when one of its rows is asked for first."""

    def __init__(self, folder: Path, columns: Columns, checksums: Columns) -> None:
        self._folder = folder
        self._columns = {name: columns[name] for name in PER_IMAGE}
        self._checksums = checksums
        self._checked = np.zeros(len(checksums[PER_IMAGE[0]]), dtype=np.bool_)

    def __call__(self, rows: slice) -> None:
        """Raises DamagedCopyError if one of the rows is not what was written."""
        for block in range(rows.start // _CHECKED_ROWS, (rows.stop - 1) // _CHECKED_ROWS + 1):
            if self._checked[block]:
                continue
            part = slice(block * _CHECKED_ROWS, (block + 1) * _CHECKED_ROWS)
            for name, column in self._columns.items():
                if zlib.crc32(column[part].data) != self._checksums[name][block]:
                    raise DamagedCopyError(f"{self._folder}: its {name} is damaged; remove the folder")
            self._checked[block] = True


def _say(text: str, on_note: Callable[[str], None] | None) -> None:
    """Hands a line to `on_note`, or prints it on stderr, there by the first process of a machine alone."""
    if on_note:
        on_note(text)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"rerankvpr: {text}", file=sys.stderr)
