"""The index of a shard set: `index.parquet`, one row an image, with counts and digests in its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FORMAT_VERSION = 1
INDEX = "index.parquet"
INDEX_DIGEST = "index.parquet.sha256"
METADATA_KEY = b"rerankvpr"

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
    """An image that was left out: its CSV and line, its file (both relative to the data set), and why."""

    csv: str
    row: int
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.csv} row {self.row}: {self.file}: {self.reason}"


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
class ShardIndex:
    """A shard set's index: rows sorted by (place_id, view), place ids 0 to n-1, the views of a place 0 to v-1.

    Per image: view, offset and size (bytes in the tar), crc32, shard (number in `metadata.shards`). Per place:
    place_starts (int64 [n + 1], rows of place p are place_starts[p] to place_starts[p + 1]), num_views, place_city
    (number in `cities`). `table` holds every column.
    """

    folder: Path
    table: pa.Table
    metadata: ShardSetMetadata
    cities: list[str]
    place_starts: NDArray[np.int64]
    num_views: NDArray[np.int64]
    place_city: NDArray[np.int64]
    view: NDArray[np.int32]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32]

    @property
    def num_places(self) -> int:
        """Places in all cities."""
        return len(self.num_views)

    @property
    def num_images(self) -> int:
        """Images of all places."""
        return len(self.table)

    def rows(self, place_id: int) -> slice:
        """The rows of a place."""
        return slice(int(self.place_starts[place_id]), int(self.place_starts[place_id + 1]))

    def shard_path(self, place_id: int) -> Path:
        """The tar that holds a place."""
        return self.folder / self.metadata.shards[int(self.shard[self.place_starts[place_id]])].name


def write_index(folder: Path, table: pa.Table, metadata: ShardSetMetadata) -> None:
    """Write `index.parquet` and, in the form that `sha256sum -c` reads, `index.parquet.sha256`.

    Both go to temporary names and are renamed, the index last: where it exists, the set is complete.
    """
    temporary = folder / f"{INDEX}.tmp"
    write_table(temporary, table, asdict(metadata))
    digest = folder / f"{INDEX_DIGEST}.tmp"
    digest.write_text(f"{file_sha256(temporary)}  {INDEX}\n")
    sync(digest)
    digest.replace(folder / INDEX_DIGEST)
    temporary.replace(folder / INDEX)
    sync(folder)


def write_table(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    """Write a table of SCHEMA with metadata, and wait until it is on the disk."""
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata, separators=(",", ":"))})
    pq.write_table(table.cast(schema).combine_chunks(), path, compression="zstd", write_page_checksum=True)
    sync(path)


def read_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A table that `write_table` wrote, and its metadata; ValueError where it is damaged or something else."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
            said = dict(table.schema.metadata or {})
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path}: damaged, or no Parquet file ({str(error).splitlines()[0]})") from error
    try:
        metadata = json.loads(said[METADATA_KEY])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: a Parquet file, but not the index of a shard set") from error
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {version}; expected {FORMAT_VERSION}: shard the data again")
    if not table.schema.equals(SCHEMA):
        raise ValueError(f"{path}: its columns are not those of format version {FORMAT_VERSION}; shard the data again")
    return table, metadata


def read_index(folder: Path) -> ShardIndex:
    """The index of the shard set at `folder`.

    Raises FileNotFoundError where there is none, ValueError where it is damaged, foreign, of another format version,
    or contradicts itself.
    """
    path = folder / INDEX
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {INDEX}: not a shard set, or not finished"
        raise FileNotFoundError(f"{folder}: {what}; `rerankvpr shard gsv-cities SRC {folder}` writes one")
    table, raw = read_table(path)
    try:
        raw["bad"] = [BadImage(**bad) for bad in raw["bad"]]
        raw["shards"] = [ShardFile(**shard) for shard in raw["shards"]]
        metadata = ShardSetMetadata(**raw)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its metadata is not that of a shard set") from error

    place_id, view = table["place_id"].to_numpy(), table["view"].to_numpy()
    starts = np.concatenate([np.flatnonzero(np.diff(place_id, prepend=-1)), [len(table)]]).astype(np.int64)
    num_views = np.diff(starts)
    names = {shard.name: number for number, shard in enumerate(metadata.shards)}
    shard_codes = table["shard"].combine_chunks().dictionary_encode()
    numbers = np.array([names.get(name, -1) for name in shard_codes.dictionary.to_pylist()], dtype=np.int64)
    shard = numbers[shard_codes.indices.to_numpy()]
    city_codes = table["city"].combine_chunks().dictionary_encode()
    city = city_codes.indices.to_numpy().astype(np.int64)
    first = starts[:-1]
    consistent = (
        len(table) == metadata.images > 0
        and len(first) == metadata.places
        and np.array_equal(place_id, np.repeat(np.arange(len(first)), num_views))
        and np.array_equal(view, np.arange(len(table)) - np.repeat(first, num_views))
        and np.array_equal(city, np.repeat(city[first], num_views))
        and np.array_equal(shard, np.repeat(shard[first], num_views))
        and shard.min() >= 0
    )
    if not consistent:
        raise ValueError(f"{path}: its rows contradict its metadata or each other; shard the data again")
    return ShardIndex(
        folder=folder,
        table=table,
        metadata=metadata,
        cities=city_codes.dictionary.to_pylist(),
        place_starts=starts,
        num_views=num_views,
        place_city=city[first],
        view=view,
        shard=shard,
        offset=table["offset"].to_numpy(),
        size=table["size"].to_numpy(),
        crc32=table["crc32"].to_numpy(),
    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
