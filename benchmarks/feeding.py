"""What feeds GPUs: images a second of the loader by threads and ranks, and the interpreter lock's share of the work.

`python -m benchmarks.feeding [--threads 1 2 4] [--ranks 1 2 4] [--json FILE]`

The lock's share is bounded by the processor time of threads: all of a run's, less that spent inside the two calls that
release the lock, libjpeg-turbo's decode and torch's resize. What is left over, reads and waits of the kernel included,
is taken to hold the lock, so `1 / (left over of an image)` is a rate that one process passes on no number of cores.
Processor time does not grow while a thread waits for the lock or for a core, so other load changes it little. Whether
the two calls release the lock is measured too: two threads that do nothing else, against one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

import torch
import tyro

from benchmarks.batches import endless, plans_and_loader
from benchmarks.loader_peers import images_per_second
from benchmarks.report import print_table, write_json
from configs.node import GPUS, IMAGES_PER_GPU_S
from configs.schema import DataConfig
from data_pipeline import decoders, images
from data_pipeline.decode_cost import example_jpegs
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town


@dataclass(frozen=True)
class Options:
    """Measures what a loader delivers by threads and ranks."""

    source: Path | None = None
    """Folder in GSV-Cities' layout; without it a town is rendered."""
    threads: tuple[int, ...] = ()
    """Decoding threads of one rank; without it 1, 2, 4 ... up to the cores."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Ranks of the node, a decoding thread for each of their cores, at least one."""
    side: int = 224
    """Side in pixels of the images delivered."""
    images: int = 4000
    """Images of a run, over all ranks."""
    json: Path | None = None
    """File for the figures."""


class Released:
    """Processor time of threads inside a call that releases the interpreter's lock."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call, self._lock, self.seconds = call, threading.Lock(), 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        began = time.thread_time()
        try:
            return self._call(*args, **options)
        finally:
            spent = time.thread_time() - began
            with self._lock:
                self.seconds += spent


def run_rank(
    shards: Path, threads: int, side: int, images_: int, barrier: Barrier | None, watch: bool
) -> dict[str, float]:
    """One rank's rate, and if `watch` processor seconds of an image: in all, and outside the released calls."""
    torch.set_num_threads(1)
    released: list[Released] = []
    if watch:
        decode, resize = Released(decoders.decode_jpeg), Released(images._RESIZE["bilinear"])
        decoders.decode_jpeg, images._RESIZE["bilinear"] = decode, resize  # type: ignore[assignment]
        released = [decode, resize]
    data = DataConfig(
        shards=str(shards), places_per_batch=16, images_per_place=4, composition="mixed", image_size=side,
        decode_threads=threads, read_ahead_mb=16,
    )  # fmt: skip
    batches = endless(*plans_and_loader(data))
    next(batches)
    if barrier:
        barrier.wait()
    cpu, inside = time.process_time(), sum(one.seconds for one in released)
    delivered = images_ // 64 * 64 + 128  # with the two batches that are not timed
    rate = images_per_second(batches, images_, 64)
    cpu, inside = time.process_time() - cpu, sum(one.seconds for one in released) - inside
    batches.close()
    return {"images_per_s": rate, "cpu_s": cpu / delivered, "held_s": (cpu - inside) / delivered}


def _in_process(results: Queue[dict[str, float]], *args: Any) -> None:
    results.put(run_rank(*args))


def of_ranks(shards: Path, ranks: int, threads: int, options: Options, *, watch: bool) -> list[dict[str, float]]:
    """What each of some ranks measures, all at the same time, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    results: Queue[dict[str, float]] = context.Queue()
    barrier = context.Barrier(ranks)
    args = (shards, threads, options.side, options.images // ranks, barrier, watch)
    processes = [context.Process(target=_in_process, args=(results, *args)) for _ in range(ranks)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def released_speedup(side: int) -> float:
    """Rate of two threads in the released calls alone over that of one: 2 where the lock is released throughout."""
    torch.set_num_threads(1)
    jpegs = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in example_jpegs()]

    def decode(_: int) -> None:
        out = images.empty_batch(1, side)
        for jpeg in jpegs * 20:
            image = cast(torch.Tensor, decoders.decode_jpeg(jpeg))
            images._RESIZE["bilinear"](image.unsqueeze(0), [side, side], False, None, None, out=out)

    seconds = []
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            list(pool.map(decode, range(4)))
            seconds.append(time.perf_counter() - began)
    return seconds[0] / seconds[1]


def main(options: Options) -> dict[str, float]:
    """Runs all, prints two tables, and returns the figures."""
    cores = len(os.sched_getaffinity(0))
    counts = options.threads or tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= cores)
    with tempfile.TemporaryDirectory() as name:
        work, source = Path(name), options.source
        if source is None:
            render_town(work / "town", Town(held_out_places=0))
            source = work / "town" / "train"
        write_shards(read_gsv_cities(source), work / "set")
        figures: dict[str, float] = {"cores": float(cores), "released_speedup": released_speedup(options.side)}
        rows = []
        runs = [(1, threads) for threads in counts]
        runs += [(ranks, max(1, cores // ranks)) for ranks in options.ranks if (ranks, cores // ranks) not in runs]
        for ranks, threads in runs:
            rate = sum(one["images_per_s"] for one in of_ranks(work / "set", ranks, threads, options, watch=False))
            figures[f"ranks_{ranks}_threads_{threads}_images_per_s"] = rate
            busy = min(cores, ranks * threads)
            rows.append([f"{ranks} x {threads}", f"{rate:,.0f}", f"{rate / busy:,.0f}"])
        (watched,) = of_ranks(work / "set", 1, max(1, cores), options, watch=True)
    cpu_us, held_us = 1e6 * watched["cpu_s"], 1e6 * watched["held_s"]
    demand = GPUS * IMAGES_PER_GPU_S
    figures |= {
        "cpu_us_per_image": cpu_us,
        "lock_us_per_image": held_us,
        "lock_share": held_us / cpu_us,
        "most_of_one_process_images_per_s": 1e6 / held_us,
        "cores_for_eight_gpus": demand * cpu_us / 1e6,
    }
    print_table(f"the loader on {cores} cores, to {options.side} px", ["ranks x threads", "images/s", "a core"], rows)
    print(
        f"an image takes {cpu_us:.0f} us of a core, {held_us:.0f} us of them with the interpreter's lock at most "
        f"({held_us / cpu_us:.0%}): one process delivers {1e6 / held_us:,.0f} images/s at most; two threads in the "
        f"calls that release it are {figures['released_speedup']:.2f} times as fast as one\n"
        f"a node of {GPUS} GPUs at {IMAGES_PER_GPU_S:,.0f} images/s takes {demand * cpu_us / 1e6:.0f} such cores"
    )
    write_json(options.json, figures)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Options))
