"""The photographs of an index: `images.parquet` of each part, a row per photograph in the order of its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.files import replacing
from configs.reading import reading
from data_pipeline.positions import MAP, Positions
from eval.index.manifest import IndexFault

FILE = "images.parquet"

SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # relative to the part's root
        ("east", pa.float64()),
        ("north", pa.float64()),
        ("zone", pa.int64()),
        ("lat", pa.float64()),
        ("lon", pa.float64()),
        ("time", pa.timestamp("ms")),  # the camera's own clock
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)


@dataclass(frozen=True)
class Images:
    """Names, positions, times and files' sizes and SHA-256s of N photographs."""

    names: list[str]
    positions: Positions
    times: NDArray[np.datetime64]  # NaT where unknown
    sizes: NDArray[np.int64]
    sha256: NDArray[np.uint8]  # [N, 32]

    def __len__(self) -> int:
        return len(self.names)


def write_images(folder: Path, images: Images) -> None:
    """Writes the table of a part; it appears whole or not at all."""
    positions = images.positions

    def known(values: NDArray[np.float64]) -> pa.Array:
        return pa.array(values, mask=~np.isfinite(values))

    sha256 = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(images), [None, pa.py_buffer(np.ascontiguousarray(images.sha256))]
    )
    table = pa.table(
        [
            pa.array(images.names, pa.string()),
            known(positions.east),
            known(positions.north),
            pa.array(positions.zone, pa.int64()),
            known(positions.lat),
            known(positions.lon),
            pa.array(images.times.astype("datetime64[ms]"), pa.timestamp("ms")),
            pa.array(images.sizes, pa.int64()),
            sha256,
        ],
        schema=SCHEMA,
    )
    with replacing(folder / FILE, durable=True) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_images(folder: Path, count: int, *, in_metres: bool) -> Images:
    """The table of a part. Raises IndexFault naming it where it is damaged or of another number of photographs."""
    file = folder / FILE
    with reading(file, "the table of an index's photographs", IndexFault):
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
        if not table.schema.equals(SCHEMA) or len(table) != count:
            raise ValueError(f"{len(table)} rows of {len(table.schema)} columns for {count} photographs")
        column = {name: table[name].combine_chunks() for name in table.column_names}
        numbers = {
            name: column[name].fill_null(np.nan).to_numpy(zero_copy_only=False)
            for name in ("east", "north", "lat", "lon")
        }
        sha256 = column["sha256"]
        raw = np.frombuffer(sha256.buffers()[1], np.uint8) if count else np.zeros(0, np.uint8)
        positions = Positions(
            numbers["east"], numbers["north"], column["zone"].to_numpy(), numbers["lat"], numbers["lon"], in_metres
        )
        return Images(
            column["name"].to_pylist(),
            positions,
            column["time"].to_numpy(zero_copy_only=False).astype("datetime64[s]"),
            column["bytes"].to_numpy(),
            raw[32 * sha256.offset : 32 * (sha256.offset + count)].reshape(count, 32),
        )


def joined(parts: Sequence[Images]) -> Images:
    """Several tables under one numbering, one after another."""
    return Images(
        [name for part in parts for name in part.names],
        joined_positions([part.positions for part in parts]),
        np.concatenate([np.zeros(0, "datetime64[s]"), *(part.times for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.sizes for part in parts)]),
        np.concatenate([np.zeros((0, 32), np.uint8), *(part.sha256 for part in parts)]),
    )


def joined_positions(parts: Sequence[Positions]) -> Positions:
    """Positions one after another; distances are the map's only where all were given in metres."""
    east, north, lat, lon = (
        np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)])
        for name in ("east", "north", "lat", "lon")
    )
    zone = np.concatenate([np.zeros(0, np.int64), *(part.zone for part in parts)])
    return Positions(east, north, zone, lat, lon, all(part.in_metres for part in parts))


def unknown_positions(count: int) -> Positions:
    """Positions that nobody knows."""
    nothing = np.full(count, np.nan)
    return Positions(nothing, nothing, np.full(count, MAP), nothing, nothing, True)
