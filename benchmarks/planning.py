"""Cost of an index and of an epoch plan at 10^5 to 10^7 places: `python -m benchmarks.planning [--json FILE]`.

The index is synthetic: 4 images a place, 200 cities, tars of 2,000 places. Reading includes its sha256 and its checks.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks.report import print_table, write_json
from data_pipeline.index import (
    INDEX,
    INDEX_DIGEST,
    METADATA_KEY,
    SCHEMA,
    ShardFile,
    ShardSetMetadata,
    digest_line,
    file_sha256,
    read_index,
)
from data_pipeline.plan import Batching, plan_epoch

VIEWS, CITIES, PLACES_PER_TAR, AT_ONCE = 4, 200, 2_000, 500_000


@dataclass(frozen=True)
class Options:
    """Measures the index and the plan."""

    places: tuple[int, ...] = (10**5, 10**6, 10**7)
    """Numbers of places."""
    json: Path | None = None
    """File for the figures."""


def write_synthetic_index(folder: Path, places: int) -> None:
    """The index of a set that has no tars."""
    tars = -(-places // PLACES_PER_TAR)
    names = [f"shards/train-{tar:06d}.tar" for tar in range(tars)]
    metadata = ShardSetMetadata(
        images=places * VIEWS,
        places=places,
        cities=CITIES,
        places_left_out=0,
        images_left_out=0,
        fingerprint="",
        shards=[ShardFile(name, PLACES_PER_TAR * VIEWS * 30_000, "0" * 64) for name in names],
    )
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(asdict(metadata))})
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / INDEX, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, places, AT_ONCE):
            place = np.repeat(np.arange(start, min(start + AT_ONCE, places)), VIEWS)
            view = np.arange(len(place)) % VIEWS
            columns = {
                "place_id": place,
                "city": pa.DictionaryArray.from_arrays(
                    (place * CITIES // places).astype(np.int32), [f"city{n:04d}" for n in range(CITIES)]
                ),
                "city_place_id": place,
                "view": view,
                "shard": pa.DictionaryArray.from_arrays((place // PLACES_PER_TAR).astype(np.int32), names),
                "offset": (place % PLACES_PER_TAR * VIEWS + view) * 30_000,
                "size": rng.integers(20_000, 29_000, len(place)),
                "crc32": rng.integers(0, 2**32, len(place), dtype=np.uint32),
                "width": np.full(len(place), 400),
                "height": np.full(len(place), 300),
                "lat": rng.uniform(-60, 60, len(place)),
                "lon": rng.uniform(-180, 180, len(place)),
                "year": rng.integers(2008, 2023, len(place)),
                "month": rng.integers(1, 13, len(place)),
                "northdeg": rng.integers(0, 360, len(place)),
                "panoid": pa.array(np.char.mod("%016x", rng.integers(0, 2**62, len(place)))),
            }
            writer.write_table(pa.table(columns).cast(schema))
    (folder / INDEX_DIGEST).write_bytes(digest_line(file_sha256(folder / INDEX)))


def main(options: Options) -> dict[str, float]:
    """Measures each size, prints a table and returns the figures."""
    figures: dict[str, float] = {}
    rows = []
    for places in options.places:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_synthetic_index(folder, places)
            size_mb = (folder / INDEX).stat().st_size / 2**20
            before, began = _resident_mb(), time.perf_counter()
            index = read_index(folder)
            read_s, held_mb = time.perf_counter() - began, _resident_mb() - before
        seconds = {}
        for composition in ("city", "mixed"):
            began = time.perf_counter()
            plan_epoch(
                index.place_city,
                index.num_views,
                Batching(places_per_batch=1024, images_per_place=4, composition=composition),
                seed=0,
                epoch=1,
            )
            seconds[composition] = time.perf_counter() - began
        began, lookups = time.perf_counter(), 10_000
        for place in np.random.default_rng(0).integers(0, places, lookups).tolist():
            index.place_range(place)
        lookup_us = (time.perf_counter() - began) / lookups * 1e6
        del index
        key = f"places_1e{round(np.log10(places))}"
        figures |= {
            f"{key}_read_s": read_s,
            f"{key}_held_mb": held_mb,
            f"{key}_file_mb": size_mb,
            f"{key}_plan_city_s": seconds["city"],
            f"{key}_plan_mixed_s": seconds["mixed"],
            f"{key}_lookup_us": lookup_us,
        }
        columns = (f"{places:,}", f"{size_mb:,.1f}", f"{read_s:.2f}", f"{held_mb:,.0f}")
        rows.append([*columns, f"{seconds['city']:.2f}", f"{seconds['mixed']:.2f}", f"{lookup_us:.1f}"])
    print_table(
        "index and epoch plan",
        ["places", "index, MB", "read, s", "held, MB", "plan city, s", "plan mixed, s", "a place, us"],
        rows,
    )
    write_json(options.json, figures)
    return figures


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main(tyro.cli(Options))
