"""What was found in archives, kept on disk a chunk at a time: an interrupted run takes it up behind the last one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.files import replacing
from configs.reading import reading
from data_pipeline.archives.files import Archive
from data_pipeline.index import METADATA_KEY

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the table, from 0; -1 if it names no such member
        ("name", pa.string()),
        ("spilled", pa.bool_()),  # offset is then in the chunk's spill file, and the bytes are the photograph's own
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("size", pa.int64()),
        ("method", pa.int8()),
        ("crc32", pa.int64()),
        ("why", pa.string()),  # the reason why it is not used
    ]
)


@dataclass(frozen=True)
class Chunk:
    """A stretch of an archive: members from `start` to `after`, `is_last` if its end was reached.

    `fault` says how it ended before its end, `spill` names the file of `spill_bytes` bytes that holds its photographs,
    `others` counts members that are no photographs by suffix.
    """

    archive: Archive
    number: int
    start: int
    after: int
    is_last: bool
    fault: str = ""
    spill: str = ""
    spill_bytes: int = 0
    others: dict[str, int] = field(default_factory=dict)


def stem(archive: Archive) -> str:
    """How the chunks of an archive are called, whatever other archives there are."""
    return hashlib.sha256(archive.shown.encode()).hexdigest()[:16]


def chunk_path(folder: Path, archive: Archive, number: int) -> Path:
    """The file of a chunk."""
    return folder / f"{stem(archive)}-{number:05d}.parquet"


def write_chunk(folder: Path, chunk: Chunk, columns: dict[str, list[Any]]) -> None:
    """Writes a chunk's members; it is there as a whole or not at all."""
    said = json.dumps(asdict(replace(chunk, archive=_plain(chunk.archive))))
    table = pa.table(columns, schema=SCHEMA.with_metadata({METADATA_KEY: said}))
    with replacing(chunk_path(folder, chunk.archive, chunk.number), durable=True) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_chunk(path: Path) -> tuple[Chunk, pa.Table]:
    """A chunk and its members (SCHEMA). Raises ValueError for a file that is none."""
    with reading(path, "a list of an archive's members; remove it and its archive is read again"):
        table = pq.read_table(path, memory_map=False)
        return _chunk(table.schema), table


def chunks_of(folder: Path, archive: Archive, *, need_spill: bool) -> Iterator[Chunk]:
    """The chunks of an archive that an earlier run has finished and that are still true, in order.

    With `need_spill`, one whose spill file is gone is not.
    """
    after = 0
    for number in range(2**31):
        path = chunk_path(folder, archive, number)
        if not path.is_file():
            return
        with reading(path, "a list of an archive's members; remove it and its archive is read again"):
            chunk = _chunk(pq.read_schema(path))
        if chunk.archive != _plain(archive) or chunk.start != after:
            return
        if chunk.spill and need_spill:
            spill = folder / chunk.spill
            if not spill.is_file() or spill.stat().st_size != chunk.spill_bytes:
                return
        yield chunk
        if chunk.is_last:
            return
        after = chunk.after


def _plain(archive: Archive) -> Archive:
    """As it is written to disk."""
    return replace(archive, location=archive.shown)


def _chunk(schema: pa.Schema) -> Chunk:
    said = json.loads((schema.metadata or {})[METADATA_KEY])
    return Chunk(**said | {"archive": Archive(**said["archive"])})
