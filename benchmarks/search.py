"""Search over ranks and blocks against one flat FAISS index: work, memory, and whether the neighbours are the same.

`python -m benchmarks.search [--json FILE]`. The processes are real gloo ranks on this machine, one thread each. Their
work is the CPU time of all ranks together, without making the rows: on one machine, more ranks than cores are no
faster. Processes that share a core also spend more CPU time on the same work; so beside the ratio to one index that has
the machine to itself stands the ratio to as many processes, each of which searches a bare index over its part of the
rows at the same time and merges nothing. Rows are random. For the comparison they are there before the clock starts;
for a database larger than memory they are made a block at a time, and memory is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import torch.distributed as dist
import tyro
from numpy.typing import NDArray

from benchmarks.peak_memory import Peak
from benchmarks.report import print_table, write_json
from eval.approximate import train_index
from eval.search import agreement, search_blocks, search_ranks

ROWS_PER_SEED = 1 << 16


@dataclass(frozen=True)
class Task:
    """A search for random queries in a database of random rows."""

    rows: int = 1_000_000
    """Database rows of the comparison with one index."""
    size: int = 64
    """Channels of a row."""
    queries: int = 100
    """Queries."""
    k: int = 100
    """Neighbours of each."""
    block_mb: int = 64
    """Rows held at a time, in MB; rounded up to a multiple of 65,536 rows."""

    @property
    def block_rows(self) -> int:
        """Rows of a block, a multiple of ROWS_PER_SEED."""
        return -(-(self.block_mb << 20) // (4 * self.size * ROWS_PER_SEED)) * ROWS_PER_SEED

    def mb(self, rows: int) -> float:
        """MB of that many rows."""
        return rows * self.size * 4 / 2**20

    def __str__(self) -> str:
        return f"{self.queries} queries, top {self.k}, in {self.rows:,} x {self.size} rows"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    json: Path | None = None
    """File for the figures."""
    task: Annotated[Task, tyro.conf.arg(name="")] = field(default_factory=Task)
    large_rows: int = 10_000_000
    """Database rows that are searched in blocks alone; 0 for none."""
    world_sizes: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks, one thread each."""
    large_world: int = 2
    """Ranks that search the large database."""
    repeats: int = 3
    """Times that each is run, in turn; the table shows the median, and the ratios of each turn."""
    indices: tuple[str, ...] = ("IVF256,Flat:nprobe=16", "IVF256,PQ16:nprobe=16", "HNSW32:efSearch=128")
    """Approximate indices FACTORY:PARAMS that are compared over the first 50,000 rows."""


def main() -> None:
    """Measures and prints."""
    if len(sys.argv) == 6 and sys.argv[1] == "rank":
        _rank(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    options = tyro.cli(Options, prog="python -m benchmarks.search")
    figures = _against_one_index(options)
    if options.large_rows:
        figures |= _large(options)
    figures |= _approximate(options)
    write_json(options.json, figures)


def _against_one_index(options: Options) -> dict[str, float]:
    turns = []
    for _ in range(options.repeats):
        bare = {world: _run(options.task, "bare", world) for world in {1, *options.world_sizes}}
        turns.append((bare, {world: _run(options.task, "ranks", world) for world in options.world_sizes}))
    one, first = turns[0][0][1], turns[0][1][options.world_sizes[0]]
    cpu = float(np.median([bare[1]["cpu"] for bare, _ in turns]))
    figures = {"flat_cpu_s": cpu}
    rows: list[list[str]] = [["one IndexFlatIP, bare", f"{cpu:.2f}", "", "", "", ""]]
    for world in options.world_sizes:
        ofs = [ranks[world] for _, ranks in turns]
        if any((of["ids"], of["scores"]) != (first["ids"], first["scores"]) for of in ofs):
            raise SystemExit(f"{world} ranks do not give what {options.world_sizes[0]} give")
        cpu = float(np.median([of["cpu"] for of in ofs]))
        over_flat = [ranks[world]["cpu"] / bare[1]["cpu"] for bare, ranks in turns]
        over_parts = [ranks[world]["cpu"] / bare[world]["cpu"] for bare, ranks in turns]
        same = np.mean([sorted(a) == sorted(b) for a, b in zip(one["ids"], ofs[0]["ids"], strict=True)])
        rows.append(
            [
                f"{world} rank{'s' * (world > 1)}",
                f"{cpu:.2f}",
                *(f"{np.median(of):.3f} ({min(of):.3f} to {max(of):.3f})" for of in (over_flat, over_parts)),
                f"{100 * same:.1f} %",
                "yes",
            ]
        )
        figures |= {
            f"world{world}_cpu_s": cpu,
            f"world{world}_over_flat": float(np.median(over_flat)),
            f"world{world}_over_parts": float(np.median(over_parts)),
            f"world{world}_same_neighbours": float(same),
        }
    columns = [
        "",
        "CPU s, all ranks",
        "of one bare index's (range)",
        "of as many bare parts' at once (range)",
        "queries with its neighbours",
        "ids, scores equal at any number of ranks",
    ]
    title = f"{options.task}, blocks of {options.task.block_mb} MB; {options.repeats} turns"
    print_table(title, columns, rows)
    return figures


def _large(options: Options) -> dict[str, float]:
    """A database in blocks, and the memory that it takes beside what the rows would take."""
    task = replace(options.task, rows=options.large_rows)
    found, whole_mb = _run(task, "blocks", options.large_world), task.mb(task.rows)
    row = [f"{options.large_world} ranks", f"{found['wall']:.1f}", f"{found['cpu']:.1f}", f"{found['mb']:.0f}"]
    print_table(
        str(task),
        ["", "s", "CPU s, all ranks", "peak MB above start, a rank", "MB of a block", "MB of all rows"],
        [[*row, f"{task.mb(task.block_rows):.0f}", f"{whole_mb:.0f}"]],
    )
    return {
        "large_rows": float(options.large_rows),
        "large_s": found["wall"],
        "large_cpu_s": found["cpu"],
        "large_peak_mb": found["mb"],
        "large_rows_mb": whole_mb,
    }


def _approximate(options: Options) -> dict[str, float]:
    count = min(options.task.rows, 50_000)
    ((_, rows_ND),) = _blocks(0, count, options.task.size, count, [0.0])
    queries_QD = _rows(-1, options.task.queries, options.task.size)
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    _, exact = search_blocks(queries_QD, [(0, rows_ND)], 10)
    for name in options.indices:
        factory, _, params = name.partition(":")
        start = time.perf_counter()
        _, ids = search_blocks(queries_QD, [(0, rows_ND)], 10, train_index(factory, params, rows_ND))
        seconds, recall = time.perf_counter() - start, agreement(ids, exact)
        rows.append([name, f"{recall:.1f}", f"{seconds:.2f}"])
        figures[f"recall_{factory.replace(',', '_').lower()}"] = recall
    title = f"Approximate indices, random {count:,} x {options.task.size}"
    print_table(title, ["index", "% of the exact top 10", "s, building included"], rows)
    return figures


def _run(task: Task, kind: str, world: int) -> dict[str, Any]:
    """Searches in `world` processes; the work of all.

    `bare` are indices over parts of the rows; `ranks` search one database, whose rows are there; in `blocks` rows are
    made as they are searched.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(asdict(task)))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = [sys.executable, "-m", "benchmarks.search", "rank", name]
        ranks = [subprocess.Popen([*start, str(rank), str(world), kind], env=env) for rank in range(world)]
        if sum(process.wait() != 0 for process in ranks):
            raise SystemExit("a rank failed")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(ranks))]
    if kind != "bare" and any((of["ids"], of["scores"]) != (found[0]["ids"], found[0]["scores"]) for of in found):
        raise SystemExit(f"the {world} ranks do not agree")
    slowest = {key: max(of[key] for of in found) for key in ("wall", "mb")}
    return {**found[0], **slowest, "cpu": sum(of["cpu"] for of in found)}


def _rank(folder: Path, rank: int, world: int, kind: str) -> None:
    task = Task(**json.loads((folder / "task.json").read_text()))
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    queries_QD = _rows(-1, task.queries, task.size)
    search_blocks(queries_QD[:20], [(0, _rows(0, 4096, task.size))], 5)  # loads what FAISS loads at its first call
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    seeds = -(-task.rows // ROWS_PER_SEED)
    first, stop = (min(task.rows, seeds * r // world * ROWS_PER_SEED) for r in (rank, rank + 1))
    making = [0.0]
    blocks: Iterable[tuple[int, NDArray[np.float32]]]
    blocks = _blocks(first, stop, task.size, task.block_rows, making)
    index = faiss.IndexFlatIP(task.size)
    if kind == "bare":
        for _, rows_ND in blocks:
            index.add(rows_ND)
            del rows_ND
    elif kind == "ranks":
        blocks = list(blocks)
    made, peak = making[0], Peak()
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    scores, ids = index.search(queries_QD, task.k) if kind == "bare" else search_ranks(queries_QD, blocks, task.k)
    figures = {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu - (making[0] - made),
        "mb": peak.mb(),
        "ids": ids.tolist(),
        "scores": scores.tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _blocks(
    first: int, stop: int, size: int, per_block: int, making: list[float]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Rows first to stop (`first` a multiple of ROWS_PER_SEED) in blocks, the same rows however they are cut.

    The CPU seconds that making them took are added to `making[0]`.
    """
    for low in range(first, stop, per_block):
        cpu, high = time.process_time(), min(stop, low + per_block)
        rows_ND = np.empty((high - low, size), dtype=np.float32)
        for start in range(low, high, ROWS_PER_SEED):
            count = min(ROWS_PER_SEED, high - start)
            rows_ND[start - low : start - low + count] = _rows(start // ROWS_PER_SEED, count, size)
        making[0] += time.process_time() - cpu
        yield low, rows_ND
        del rows_ND


def _rows(seed: int, count: int, size: int) -> NDArray[np.float32]:
    """Random unit rows; seed -1 is the queries."""
    rows = np.random.default_rng(seed + 1).standard_normal((count, size), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


if __name__ == "__main__":
    main()
