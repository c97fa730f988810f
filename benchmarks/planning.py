"""Cost of an index and of an epoch plan: `python -m benchmarks.planning [--sizes 100000 25000000] [--json FILE]`.

The index is synthetic: 4 images a place, 200 cities, tars of 2,000 places. Two ranks open it beside each other, first
each for itself (read and checked: its sha256 and its rows), then from the copy that they map. Memory is proportional
(PSS, /proc/self/smaps_rollup): of pages that both map, each counts half.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from benchmarks.peak_memory import Peak
from benchmarks.report import print_table, write_json
from data_pipeline import index_copy
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
from data_pipeline.index_rows import DTYPES
from data_pipeline.plan import Batching, plan_epoch
from data_pipeline.stream_plan import plan_stream, tar_order

VIEWS, CITIES, PLACES_PER_TAR, AT_ONCE = 4, 200, 2_000, 250_000
RANKS, PLACES_PER_BATCH, LOOKUPS = 2, 1024, 10_000
ON_PAPER = 250_000_000  # places: 10^9 images


@dataclass(frozen=True)
class Options:
    """Measures the index and the plan."""

    sizes: tuple[int, ...] = (10**5, 10**6, 10**7, 25 * 10**6)
    """Numbers of places; the last takes 8 GB of the temporary folder and some minutes to write."""
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
                "panoid": pc.cast(pa.array(rng.integers(0, 2**62, len(place))), pa.string()),
            }
            writer.write_table(pa.table(columns).cast(schema))
    (folder / INDEX_DIGEST).write_bytes(digest_line(file_sha256(folder / INDEX)))


def measure(places: int) -> dict[str, float]:
    """All figures of one size: of ranks the mean, of the copy's writer its own."""
    with tempfile.TemporaryDirectory() as name:
        folder, copies = Path(name) / "set", Path(name) / "copies"
        folder.mkdir()
        write_synthetic_index(folder, places)
        figures = {"file_mb": (folder / INDEX).stat().st_size / 2**20}
        own = _on_ranks(folder, None)
        figures |= {f"own_{key}": own[key] for key in ("open_s", "pss_mb")}
        figures |= _on_ranks(folder, copies, ranks=1, only_open=True, prefix="write_")
        return figures | _on_ranks(folder, copies)


def _on_ranks(
    folder: Path, copies: Path | None, *, ranks: int = RANKS, only_open: bool = False, prefix: str = ""
) -> dict[str, float]:
    """The mean of what ranks measure, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results: Queue[dict[str, float]] = context.Queue()
    barrier = context.Barrier(ranks)
    processes = [
        context.Process(target=_rank, args=(folder, copies, only_open, barrier, results)) for _ in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {f"{prefix}{key}": sum(one[key] for one in found) / ranks for key in found[0]}


def _rank(
    folder: Path, copies: Path | None, only_open: bool, barrier: Barrier, results: Queue[dict[str, float]]
) -> None:
    index_copy.SHARED_FROM_IMAGES = 1
    barrier.wait()
    before, memory, began = _pss_mb(), Peak(), time.perf_counter()
    index = index_copy.open_index(str(folder), folder=copies) if copies else read_index(folder)
    figures = {"open_s": time.perf_counter() - began}
    if only_open:
        results.put(figures | {"peak_mb": memory.mb()})
        return
    for name in ("num_views", *DTYPES):
        getattr(index, name).sum()  # as if each place had been asked for
    barrier.wait()
    figures["pss_mb"] = _pss_mb() - before
    barrier.wait()
    if copies:
        figures |= _plan_figures(index)
    results.put(figures)


def _plan_figures(index: Any) -> dict[str, float]:
    figures = {}
    batching = {name: Batching(PLACES_PER_BATCH, VIEWS, name) for name in ("city", "mixed")}
    for name in ("city", "mixed", "stream"):
        tracemalloc.start()
        began = time.perf_counter()
        if name == "stream":
            options: dict[str, Any] = {"lanes": 8, "buffer_places": 8192, "seed": 0, "epoch": 1}
            plan = plan_stream(tar_order([index]), index.num_views, batching["mixed"], **options)
        else:
            plan = plan_epoch(index.place_city, index.num_views, batching[name], seed=0, epoch=1)
        figures[f"plan_{name}_s"] = time.perf_counter() - began
        figures[f"plan_{name}_peak_mb"] = tracemalloc.get_traced_memory()[1] / 2**20
        figures[f"plan_{name}_held_mb"] = tracemalloc.get_traced_memory()[0] / 2**20
        tracemalloc.stop()
    began = time.perf_counter()
    for step in range(plan.num_steps):
        plan.rank_slice(step, 0, 8)
    figures["views_s"] = time.perf_counter() - began
    began = time.perf_counter()
    for place in np.random.default_rng(0).integers(0, index.num_places, LOOKUPS).tolist():
        index.place_range(place)
    figures["lookup_us"] = (time.perf_counter() - began) / LOOKUPS * 1e6
    return figures


TABLES: dict[str, dict[str, str]] = {
    f"opening an index, each of {RANKS} ranks": {
        "index, MB": "file_mb",
        "read, s": "own_open_s",
        "own, MB": "own_pss_mb",
        "copied, s": "write_open_s",
        "peak, MB": "write_peak_mb",
        "mapped, s": "open_s",
        "shared, MB": "pss_mb",
    },
    f"epoch plan, each of {RANKS} ranks": {
        "city, s": "plan_city_s",
        "mixed, s": "plan_mixed_s",
        "stream, s": "plan_stream_s",
        "peak, MB": "plan_mixed_peak_mb",
        "held, MB": "plan_mixed_held_mb",
        "views, s": "views_s",
        "a place, us": "lookup_us",
    },
}


def main(options: Options) -> dict[str, float]:
    """Measures each size, prints two tables and returns the figures."""
    sizes = sorted(options.sizes)
    found = {f"{places:,}": measure(places) for places in sizes}
    figures = {
        f"places_{places}_{key}": value
        for places, of_size in zip(sizes, found.values(), strict=True)
        for key, value in of_size.items()
    }
    if len(sizes) > 1:
        line = _on_paper(sizes[-2:], list(found.values())[-2:])
        figures |= {f"places_{ON_PAPER}_{key}_on_paper": value for key, value in line.items()}
        found[f"{ON_PAPER:,}, a line"] = line
    for title, columns in TABLES.items():
        rows = [[places, *(_shown(of_size[key]) for key in columns.values())] for places, of_size in found.items()]
        print_table(title, ["places", *columns], rows)
    write_json(options.json, figures)
    return figures


def _on_paper(sizes: list[int], found: list[dict[str, float]]) -> dict[str, float]:
    """What the straight line through the two largest sizes says of ON_PAPER places; lookups stay as they are."""
    line = {}
    for key in found[0]:
        slope = (found[1][key] - found[0][key]) / (sizes[1] - sizes[0])
        grows = key != "lookup_us"
        line[key] = found[1][key] + max(0.0, slope) * (ON_PAPER - sizes[1]) if grows else found[1][key]
    return line


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _pss_mb() -> float:
    """Proportional memory of this process: of pages that n processes map, an n-th."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main(tyro.cli(Options))
