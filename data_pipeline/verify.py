"""Checking a shard set: every byte of every tar against the index, and what is wrong by name."""

from __future__ import annotations

import itertools
import json
import mmap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.files import file_sha256
from configs.progress import OnProgress, untold
from configs.reading import read_regular
from data_pipeline.index import INDEX, INDEX_DIGEST, ShardFile, ShardIndex, digest_line, read_index
from data_pipeline.tars import BLOCK, header, image_member, json_member, padding, place_json, sample_key


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of the set, relative to its folder, and with which of its members, if one is known."""

    file: str
    what: str
    member: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.file, self.member, self.what]))


def verify_shards(folder: Path, on_progress: OnProgress = untold) -> list[Fault]:
    """All that is wrong with the shard set at `folder`: none, if each byte is as it was written.

    Tars are held against the sha256 in the index, and every header, photograph, JSON and padding against the rows; the
    index against `index.parquet.sha256`. `on_progress(bytes done, bytes in all)`. Raises FileNotFoundError where there
    is no shard set.
    """
    faults = _index_faults(folder)
    try:
        index = read_index(folder, check_digest=False)
        rows = index.table
    except ValueError as error:
        return [*faults, Fault(INDEX, str(error).removeprefix(f"{folder / INDEX}: "))]

    total, done = sum(shard.size for shard in index.metadata.shards), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, total)

    for number, shard in enumerate(index.metadata.shards):
        faults += _shard_faults(index, rows, number, shard, advance)
    known = {shard.name for shard in index.metadata.shards}
    extra = sorted(f"shards/{path.name}" for path in (folder / "shards").glob("*.tar"))
    return faults + [Fault(name, "not in the index; remove it") for name in extra if name not in known]


def _index_faults(folder: Path) -> list[Fault]:
    path, digest = folder / INDEX, folder / INDEX_DIGEST
    if not path.is_file():
        return []
    if not digest.is_file():
        return [Fault(INDEX_DIGEST, f"missing; without it damage to {INDEX} may go unseen")]
    if read_regular(digest) != digest_line(file_sha256(path)):
        return [Fault(INDEX, f"damaged: its sha256 is not the one in {INDEX_DIGEST}")]
    return []


def _shard_faults(
    index: ShardIndex, table: pa.Table, number: int, shard: ShardFile, advance: Callable[[int], None]
) -> list[Fault]:
    path = Path(index.location) / shard.name
    in_shard = np.flatnonzero(np.repeat(index.place_shard == number, index.num_views))
    rows = sorted(table.take(in_shard).to_pylist(), key=lambda row: row["offset"])
    if not path.is_file():
        advance(shard.size)
        return [Fault(shard.name, f"missing, and with it {len(rows)} images")]
    size = path.stat().st_size
    if size != shard.size:
        advance(shard.size)
        lost = [row for row in rows if row["offset"] + row["size"] > size]
        what = f"{size} bytes long, not {shard.size}"
        if lost:
            what += f": {len(lost)} images are cut off, from {_image_name(lost[0])} on"
        return [Fault(shard.name, what)]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        sha256 = file_sha256(path, advance)
        faults = [Fault(shard.name, what, member) for member, what in _member_faults(tar, rows)]
    if not faults and sha256 != shard.sha256:
        faults = [Fault(shard.name, "its sha256 is not the one in the index")]
    return faults


def _member_faults(tar: mmap.mmap, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Member and fault, for all that is not as the rows of the tar say."""
    places = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["place_id"])]
    position = 0
    for place, following in itertools.zip_longest(places, places[1:]):
        for row in place:
            name, size = _image_name(row), row["size"]
            if row["offset"] != position + BLOCK:
                yield name, f"the index has it at byte {row['offset']}, the tar at {position + BLOCK}"
                return
            if tar[position : position + BLOCK] != header(name, size):
                yield name, "its tar header is damaged"
            position += BLOCK
            if zlib.crc32(tar[position : position + size]) != row["crc32"]:
                yield name, "its bytes differ from the index's crc32"
            position += size
            if tar[position : position + len(padding(size))] != padding(size):
                yield name, "the padding after it is damaged"
            position += len(padding(size))
        end = following[0]["offset"] - BLOCK if following else len(tar)
        yield from _json_faults(tar[position:end], place)
        position = end


def _json_faults(data: bytes, place: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Faults of the JSON member that `data` begins with; nothing but zeros may follow it."""
    name = json_member(_key(place[0]))
    text = data[BLOCK:].split(b"\0", 1)[0]
    if data[:BLOCK] != header(name, len(text)):
        yield name, "its tar header, or its length, is damaged"
    try:
        files = [view["file"] for view in json.loads(text)["views"]]
        sound = text == place_json(place, files) and _names_agree(files, place)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        yield name, "its text is damaged, or differs from the index"
    if any(data[BLOCK + len(text) :]):
        yield name, "the padding after it is damaged"


def _names_agree(files: list[str], place: list[dict[str, Any]]) -> bool:
    """Whether source files named as GSV-Cities names them say what the rows say; other names say nothing."""
    start = f"{_key(place[0])}_"
    if 2 * sum(file.startswith(start) for file in files) <= len(files) or None in place[0].values():
        return True
    return all(
        file.startswith(start) and _agrees(file[len(start) :], row) for file, row in zip(files, place, strict=True)
    )


def _agrees(file: str, row: dict[str, Any]) -> bool:
    end = f"_{row['panoid']}.jpg"
    *numbers, lat, lon = file[: -len(end)].split("_")
    said = [f"{row['year']:04d}", f"{row['month']:02d}", f"{row['northdeg']:03d}"]
    return file.endswith(end) and numbers == said and [float(lat), float(lon)] == [row["lat"], row["lon"]]


def _key(row: dict[str, Any]) -> str:
    return sample_key(row["city"], row["city_place_id"])


def _image_name(row: dict[str, Any]) -> str:
    return image_member(_key(row), row["view"])
