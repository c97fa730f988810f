"""The index of a shard set: `index.parquet`, one row per image, with counts and digests in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.files import file_sha256, replacing, write_whole
from configs.reading import reading, reason, shown
from configs.secrets import without_secrets
from data_pipeline.index_rows import (
    DTYPES,
    PER_IMAGE,
    PER_PLACE,
    READ_COLUMNS,
    ROWS_AT_ONCE,
    Block,
    ContradictionError,
    row_blocks,
)
from data_pipeline.storage import RangeReader, is_remote, join

FORMAT_VERSION = 1
INDEX = "index.parquet"
INDEX_DIGEST = "index.parquet.sha256"
METADATA_KEY = b"rerankvpr"
MOST_NAME_BYTES = 255  # of a tar, its folder in the set included
NO_GAPS = ("city", "city_place_id", "view", "shard", "size", "width", "height")  # unlike what a photograph may not say

SCHEMA = pa.schema(
    [
        ("place_id", pa.int64()),
        ("city", pa.string()),
        ("city_place_id", pa.int64()),
        ("view", pa.int32()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("lat", pa.float64()),
        ("lon", pa.float64()),
        ("year", pa.int32()),
        ("month", pa.int32()),
        ("northdeg", pa.int32()),
        ("panoid", pa.string()),
    ]
)


@dataclass(frozen=True)
class BadImage:
    """An image that was left out: its CSV (if one lists it) and line, its file (relative to the data set), and why."""

    csv: str
    row: int
    file: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.csv} row {self.row}: " if self.csv else ""
        return f"{where}{self.file}: {self.reason}"


@dataclass(frozen=True)
class ShardFile:
    """A tar of the set: its name relative to the folder, its length and its sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardSetMetadata:
    """What `index.parquet` says about the whole set."""

    images: int
    places: int
    cities: int
    places_left_out: int
    images_left_out: int
    fingerprint: str
    bad: list[BadImage] = field(default_factory=list)
    shards: list[ShardFile] = field(default_factory=list)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class PlaceRange:
    """Where a place lies: V views in one byte range [start, start + length) of a tar.

    `offsets` (int64 [V], from `start`), `sizes` (int64 [V]) and `crc32` (uint32 [V]) are those of the views; `version`
    is the sha256 of the tar.
    """

    location: str
    version: str
    start: int
    length: int
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crc32: NDArray[np.uint32]


@dataclass(frozen=True)
class ShardIndex:
    """A shard set's index: rows sorted by (place_id, view), place ids 0 to n-1, the views of a place 0 to v-1.

    Per image: offset and size (bytes in the tar), crc32. Per place: place_starts (int64 [n + 1], rows of place p are
    place_starts[p] to place_starts[p + 1]), num_views, place_city (number in `cities`), place_shard (number in
    `metadata.shards`). `table` reads every column when it is asked for.
    `check_rows`, if there is one, raises ValueError where rows of offset, size and crc32 are not what was written.
    """

    location: str
    metadata: ShardSetMetadata
    cities: list[str]
    place_starts: NDArray[np.int64]
    num_views: NDArray[np.int64]
    place_city: NDArray[np.int64]
    place_shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    check_rows: Callable[[slice], None] | None = None

    @property
    def num_places(self) -> int:
        """Places in all cities."""
        return len(self.num_views)

    @property
    def num_images(self) -> int:
        """Images of all places."""
        return len(self.size)

    @cached_property
    def table(self) -> pa.Table:
        """All columns of all rows. Raises what `read_index` raises."""
        name = join(self.location, INDEX)
        table = read_table(_source(self.location, RangeReader()), name)[0]
        for column in NO_GAPS:
            if table[column].null_count:
                raise ValueError(f"{name}: a row without {column}; shard the data again")
        return table

    def columns(self, names: list[str]) -> pa.Table:
        """Some columns of all rows, read alone. Raises what `read_index` raises."""
        with _open_parquet(_source(self.location, RangeReader()), join(self.location, INDEX)) as file:
            return _columns(file, join(self.location, INDEX), names)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that two sets share where their tars hold the same bytes, wherever they lie; no tar is read."""
        shards = [[shard.name, shard.size, shard.sha256] for shard in self.metadata.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]

    def rows(self, place_id: int) -> slice:
        """The rows of a place."""
        return slice(int(self.place_starts[place_id]), int(self.place_starts[place_id + 1]))

    def place_range(self, place_id: int) -> PlaceRange:
        """Where the views of a place lie."""
        rows, shard = self.rows(place_id), self.metadata.shards[int(self.place_shard[place_id])]
        if self.check_rows:
            self.check_rows(rows)
        offsets, sizes = self.offset[rows], self.size[rows]
        start = int(offsets[0])
        length = int(offsets[-1] + sizes[-1]) - start
        location = join(self.location, shard.name)
        return PlaceRange(location, shard.sha256, start, length, offsets - start, sizes, self.crc32[rows])

    def shard_path(self, place_id: int) -> Path:
        """The tar that holds a place, where the set lies on this machine."""
        return Path(self.location) / self.metadata.shards[int(self.place_shard[place_id])].name


def write_index(folder: Path, table: pa.Table, metadata: ShardSetMetadata) -> None:
    """Write `index.parquet` and, in the form that `sha256sum -c` reads, `index.parquet.sha256`.

    The index appears last, and whole: where it exists, the set is complete.
    """
    with replacing(folder / INDEX, durable=True) as partial:
        write_table(partial, table, asdict(metadata))
        write_whole(folder / INDEX_DIGEST, digest_line(file_sha256(partial)), durable=True)


def write_table(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    """Write a table of SCHEMA with metadata."""
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata, separators=(",", ":"))})
    pq.write_table(table.cast(schema).combine_chunks(), path, compression="zstd", write_page_checksum=True)


def read_table(source: Path | pa.Buffer, name: str | Path = "") -> tuple[pa.Table, dict[str, Any]]:
    """A table that `write_table` wrote, and its metadata; ValueError where it is damaged or something else.

    `name` stands for the source in errors.
    """
    name = name or str(source)
    with _open_parquet(source, name) as file:
        metadata = _table_metadata(file, name)
        return _columns(file, name), metadata


def read_index(folder: str | Path, reader: RangeReader | None = None, *, check_digest: bool = True) -> ShardIndex:
    """The index of the shard set at `folder`, a path or a URL, which `reader` reads, in memory of this process.

    Raises FileNotFoundError where there is none, ValueError where it is damaged, foreign, of another format version,
    contradicts itself or names a tar outside the set's folder, StorageError where a server does not answer.
    `check_digest` holds it against its sha256.
    """
    return IndexFile(str(folder), reader or RangeReader(), check_digest=check_digest).read()


class IndexFile:
    """An `index.parquet` whose metadata has been read and checked, and its rows not."""

    def __init__(self, location: str, reader: RangeReader, *, check_digest: bool = True) -> None:
        """Raises what `read_index` raises, but for what is wrong with the rows."""
        self.location, self.name = location, without_secrets(join(location, INDEX), is_address=True)
        self._source = _source(location, reader)
        with _open_parquet(self._source, self.name) as file:
            self.raw_metadata = _table_metadata(file, self.name)
            self.num_rows = file.metadata.num_rows
        if check_digest:
            _check_digest(location, self._source, reader)
        self.metadata = checked_metadata(self.raw_metadata, location, self.name)

    def read(self) -> ShardIndex:
        """The index, in this process's memory."""
        images, places = self.metadata.images, self.metadata.places
        cities: list[str] = []
        with reading(self.name, "the rows of a shard set's index"):
            lengths = dict.fromkeys(PER_IMAGE, images) | dict.fromkeys(PER_PLACE, places) | {"place_starts": places + 1}
            if not places < images + 1 == self.num_rows + 1:
                raise self._contradicts()
            columns = {name: np.empty(length, DTYPES[name]) for name, length in lengths.items()}
            columns["place_starts"][-1] = images
        filled = dict.fromkeys(columns, 0)
        for block in self.blocks(cities):
            for name, part in block.items():
                columns[name][filled[name] : filled[name] + len(part)] = part
                filled[name] += len(part)
        return ShardIndex(
            location=self.location,
            metadata=self.metadata,
            cities=cities,
            num_views=np.diff(columns["place_starts"]),
            check_rows=None,
            **columns,
        )

    def blocks(self, cities: list[str]) -> Iterator[Block]:
        """The columns a part at a time, see `row_blocks`. Raises ValueError where the rows are not those of a set."""
        shards = [(shard.name, shard.size) for shard in self.metadata.shards]
        images, places = self.metadata.images, self.metadata.places
        with _open_parquet(self._source, self.name, read_dictionary=["city", "shard"]) as file:
            blocks = row_blocks(self._batches(file), shards, cities, images=images, places=places)
            while True:
                with reading(self.name, "the rows of a shard set's index"):
                    try:
                        block = next(blocks, None)
                    except ContradictionError as error:
                        raise self._contradicts() from error
                if block is None:
                    return
                yield block

    def _batches(self, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        batches = file.iter_batches(ROWS_AT_ONCE, columns=READ_COLUMNS)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise _damaged(self.name, error) from error
            if batch is None:
                return
            yield batch

    def _contradicts(self) -> ValueError:
        return ValueError(f"{self.name}: its rows contradict its metadata or each other; shard the data again")


def checked_metadata(raw: dict[str, Any], location: str, name: str) -> ShardSetMetadata:
    """What the JSON of an index says of the set at `location`. Raises ValueError, with the index's `name`."""
    with reading(name, "the metadata of a shard set"):
        metadata = _metadata(raw)
    if not is_remote(location):
        _refuse_links(Path(location), metadata.shards, name)
    return metadata


def _metadata(raw: dict[str, Any]) -> ShardSetMetadata:
    """The metadata in a file's JSON. Raises ValueError, TypeError or KeyError where it is not a shard set's."""
    shards = [ShardFile(**shard) for shard in raw["shards"]]
    for shard in shards:
        name = PurePosixPath(shard.name)
        if name.is_absolute() or ".." in name.parts or "\0" in shard.name or "\\" in shard.name:
            raise ValueError(f"tar {shown(shard.name)!r} is outside the set")
        if len(shard.name.encode("utf-8", "surrogatepass")) > MOST_NAME_BYTES:
            raise ValueError(f"tar {shown(shard.name)!r}: no file has so long a name")
        if type(shard.size) is not int or not 0 <= shard.size < 2**62 or not isinstance(shard.sha256, str):
            raise ValueError(f"tar {shown(shard.name)}: size {shown(shard.size)}, sha256 {shown(shard.sha256)}")
    metadata = ShardSetMetadata(**raw | {"shards": shards, "bad": [BadImage(**bad) for bad in raw["bad"]]})
    counts = ("images", "places", "cities", "places_left_out", "images_left_out")
    if any(type(getattr(metadata, count)) is not int for count in counts):
        raise ValueError("a count that is no whole number")
    return metadata


def _refuse_links(folder: Path, shards: list[ShardFile], name: str) -> None:
    """Raises ValueError where a tar is a link that leads out of the set's folder."""
    home = folder.resolve()
    inside: dict[Path, bool] = {}  # of the folders that hold tars: to resolve each tar takes long where there are many
    for shard in shards:
        path = folder / shard.name
        if path.parent not in inside:
            inside[path.parent] = path.parent.resolve().is_relative_to(home)
        if not inside[path.parent] or (path.is_symlink() and not path.resolve().is_relative_to(home)):
            raise ValueError(f"{name}: {shard.name} is a link that leads out of {folder}, which is refused")


def _source(location: str, reader: RangeReader) -> Path | pa.Buffer:
    """What Parquet reads the index from: the file itself, or the bytes that a server gave."""
    if is_remote(location):
        return pa.py_buffer(reader.read_file(join(location, INDEX)))
    path = Path(location) / INDEX
    if not path.is_file():
        what = "no such folder" if not Path(location).is_dir() else f"no {INDEX}: not a shard set, or not finished"
        raise FileNotFoundError(f"{location}: {what}; `rerankvpr shard KIND SRC {location}` writes one")
    return path


def _open_parquet(source: Path | pa.Buffer, name: str | Path, **options: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            source if isinstance(source, Path) else pa.BufferReader(source), page_checksum_verification=True, **options
        )
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error


def _columns(file: pq.ParquetFile, name: str | Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return file.read(columns=columns)
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{name}: damaged, or no Parquet file ({reason(error)})")


def _table_metadata(file: pq.ParquetFile, name: str | Path) -> dict[str, Any]:
    with reading(name, "the index of a shard set, though a Parquet file"):
        metadata: dict[str, Any] = dict(json.loads((file.schema_arrow.metadata or {})[METADATA_KEY]).items())
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{name}: format version {version}; expected {FORMAT_VERSION}: shard the data again")
    if not file.schema_arrow.equals(SCHEMA):
        raise ValueError(f"{name}: its columns are not those of format version {FORMAT_VERSION}; shard the data again")
    return metadata


def _check_digest(location: str, source: Path | pa.Buffer, reader: RangeReader) -> None:
    try:
        said = reader.read_file(join(location, INDEX_DIGEST))
    except FileNotFoundError:
        return
    digest = file_sha256(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    if said != digest_line(digest):
        raise ValueError(
            f"{without_secrets(join(location, INDEX), is_address=True)}: damaged: its sha256 is not the one in "
            f"{INDEX_DIGEST}"
        )


def digest_line(sha256: str) -> bytes:
    """What `index.parquet.sha256` holds, in the form that `sha256sum -c` reads."""
    return f"{sha256}  {INDEX}\n".encode()
