"""Search over ranks and blocks against one flat index: time, memory, and whether ids and scores are the same.

`python -m benchmarks.search [--rows N] [--json FILE]`. The rows are random and made a block at a time, so a database
larger than memory can be searched; the processes are real gloo ranks on this machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.distributed as dist
import tyro
from numpy.typing import NDArray

from benchmarks.report import print_table, write_json
from eval.search import agreement, search_blocks, search_ranks

ROWS_PER_SEED = 1 << 16


@dataclass(frozen=True)
class Options:
    """What is measured."""

    json: Path | None = None
    """File for the figures."""
    rows: int = 1_000_000
    """Database rows."""
    size: int = 64
    """Channels of a row."""
    queries: int = 100
    """Queries."""
    k: int = 100
    """Neighbours of each."""
    block_mb: int = 64
    """Rows held at a time, in MB; rounded up to a multiple of 65,536 rows."""
    world_sizes: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks, one thread each."""
    indices: tuple[str, ...] = ("IVF256,Flat:nprobe=16", "IVF256,PQ16:nprobe=16", "HNSW32:efSearch=128")
    """Approximate indices FACTORY:PARAMS that are compared over the first 50,000 rows."""


def main() -> None:
    """Measures and prints."""
    if len(sys.argv) == 5 and sys.argv[1] == "rank":
        _rank(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return
    options = tyro.cli(Options, prog="python -m benchmarks.search")
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    single: tuple[object, object] | None = None
    for world in (0, *options.world_sizes):
        found = _run(options, world)
        answer = found["ids"], found["scores"]
        single = single or answer
        if answer != single:
            raise SystemExit(f"{world} ranks do not give what one index gives")
        name = f"{world} ranks" if world else "one index over all rows"
        rows.append([name, f"{found['seconds']:.2f}", f"{found['cpu']:.2f}", f"{found['mb']:.0f}", "yes"])
        key = f"world{world}" if world else "single"
        figures |= {f"{key}_s": found["seconds"], f"{key}_cpu_s": found["cpu"], f"{key}_peak_mb": found["mb"]}
    print_table(
        f"{options.queries} queries, top {options.k}, in {options.rows:,} x {options.size} rows",
        ["", "s", "CPU s, sum", "peak MB above start, a rank", "same ids and scores"],
        rows,
    )
    figures |= _approximate(options)
    write_json(options.json, figures)


def _approximate(options: Options) -> dict[str, float]:
    count = min(options.rows, 50_000)
    rows_ND = np.concatenate([rows for _, rows in _blocks(0, count, options.size, ROWS_PER_SEED)])
    queries_QD = _rows(-1, options.queries, options.size)
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    _, exact = search_blocks(queries_QD, [(0, rows_ND)], 10)
    for name in options.indices:
        factory, _, params = name.partition(":")
        start = time.perf_counter()
        _, ids = search_blocks(queries_QD, [(0, rows_ND)], 10, factory, params)
        seconds, recall = time.perf_counter() - start, agreement(ids, exact)
        rows.append([name, f"{recall:.1f}", f"{seconds:.2f}"])
        figures[f"recall_{factory.replace(',', '_').lower()}"] = recall
    title = f"Approximate indices, random {count:,} x {options.size}"
    print_table(title, ["index", "% of the exact top 10", "s, building included"], rows)
    return figures


def _run(options: Options, world: int) -> dict[str, Any]:
    """Searches in `world` processes, or in one index over all rows where that is 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "options.json").write_text(json.dumps({**vars(options), "json": None}))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = [sys.executable, "-m", "benchmarks.search", "rank", name]
        ranks = [subprocess.Popen([*start, str(rank), str(world)], env=env) for rank in range(max(1, world))]
        if sum(process.wait() != 0 for process in ranks):
            raise SystemExit("a rank failed")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(max(1, world))]
    return {
        **found[0],
        "seconds": max(one["seconds"] for one in found),
        "cpu": sum(one["cpu"] for one in found),
        "mb": max(one["mb"] for one in found),
    }


def _rank(folder: Path, rank: int, world: int) -> None:
    options = json.loads((folder / "options.json").read_text())
    rows, size, k = options["rows"], options["size"], options["k"]
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    queries_QD = _rows(-1, options["queries"], size)
    per_block = -(-(options["block_mb"] << 20) // (4 * size * ROWS_PER_SEED)) * ROWS_PER_SEED
    if world:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        dist.barrier()
    before_mb, start, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    if world:
        seeds = -(-rows // ROWS_PER_SEED)
        first, stop = (min(rows, seeds * r // world * ROWS_PER_SEED) for r in (rank, rank + 1))
        scores, ids = search_ranks(queries_QD, _blocks(first, stop, size, per_block), k)
        dist.destroy_process_group()
    else:
        exact, ids = search_blocks(queries_QD, _blocks(0, rows, size, rows + ROWS_PER_SEED), k)
        scores = exact.astype(np.float32)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "mb": _peak_mb() - before_mb,
        "ids": ids.tolist(),
        "scores": scores.tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(figures))


def _blocks(first: int, stop: int, size: int, per_block: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Rows first to stop (`first` a multiple of ROWS_PER_SEED) in blocks, the same rows however they are cut."""
    per_block = max(ROWS_PER_SEED, per_block // ROWS_PER_SEED * ROWS_PER_SEED)
    for low in range(first, stop, per_block):
        high = min(stop, low + per_block)
        rows_ND = np.empty((high - low, size), dtype=np.float32)
        for start in range(low, high, ROWS_PER_SEED):
            count = min(ROWS_PER_SEED, high - start)
            rows_ND[start - low : start - low + count] = _rows(start // ROWS_PER_SEED, count, size)
        yield low, rows_ND


def _rows(seed: int, count: int, size: int) -> NDArray[np.float32]:
    """Random unit rows; seed -1 is the queries."""
    rows = np.random.default_rng(seed + 1).standard_normal((count, size), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
