"""Multi-Similarity loss against a full queue, forward and backward: time and extra memory.

Peers in the same run: pytorch-metric-learning's CrossBatchMemory(MultiSimilarityLoss, MultiSimilarityMiner), and the
three bare matrix products that a plain implementation cannot do without: similarities, gradient of the anchors,
gradient of the references. Each is measured in a process of its own, and so is the loss with memory.min_negative_m
over places in a square of 50 km.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from benchmarks.peak_memory import Peak
from benchmarks.report import figures_of, print_table, write_json
from configs.schema import LossConfig, MemoryConfig
from memory.global_loss import GlobalLoss
from memory.near_places import NearPlaces
from memory.queue import MemoryQueue

HEADLINE = "1024x65536x768"
PLACES = 62_000


@dataclass(frozen=True)
class Options:
    """Time and extra memory of loss + queue against pytorch-metric-learning and bare matrix products."""

    sizes: list[str] = field(default_factory=lambda: ["256x16384x384", "256x65536x768", HEADLINE, "4096x262144x768"])
    """B x M x D: images of a step, queue, descriptor."""
    repeats: int = 3
    """Measured steps, after one that warms up; the median counts."""
    library_gb: float = 16
    """The library is left out where the pair lists alone would pass this."""
    tile_mb: int = 256
    """memory.tile_mb."""
    part: Literal["all", "ours", "near", "library", "products"] = "all"
    """One part alone, for the first size: prints its figures as JSON."""
    json: Path | None = None
    """File for the figures."""


def inputs(size: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Descriptors [B, D] and queue [M, D] with place ids: 4 images a place, places of the batch anew in the queue."""
    b, m, d = (int(n) for n in size.split("x"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    ids_B = torch.randperm(PLACES, generator=generator)[: b // 4].repeat_interleave(4)
    ids_M = torch.randint(0, PLACES, (m,), generator=generator)
    queue_MD = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    local_BD = F.normalize(torch.randn(b, d, generator=generator) + 0.5 * queue_MD[:b], dim=1)
    return local_BD.to(device).requires_grad_(), ids_B.to(device), queue_MD.to(device), ids_M.to(device)


def measure(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of a step after one to warm up, the spread, and the memory it adds at its peak in bytes."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    else:
        a = torch.randn(512, 512)
        a @ a  # the libraries' own buffers
        memory = Peak()
        step()
        extra = int(memory.mb() * 2**20)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"s": statistics.median(seconds), "spread": max(seconds) - min(seconds), "bytes": float(extra)}


def near(size: str, options: Options) -> dict[str, float]:
    """`ours`, in which places nearer than 25 m are no negatives."""
    return ours(size, options, min_negative_m=25)


def ours(size: str, options: Options, min_negative_m: float = 0) -> dict[str, float]:
    """This project's loss with its defaults: gradient to both sides of a pair in the batch, decay 0.1."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    local_BD, ids_B, queue_MD, ids_M = inputs(size)
    queue = MemoryQueue(0, queue_MD.shape[1], queue_MD.device)
    queue.size = len(queue_MD)
    queue.descriptors_mD, queue.place_ids_M = queue_MD, ids_M
    queue.steps_M = torch.arange(len(ids_M), device=ids_M.device) // len(ids_B)
    queue.num_enqueued += len(ids_M)
    config = MemoryConfig(size=len(ids_M), tile_mb=options.tile_mb, min_negative_m=min_negative_m)
    points_n3 = 50_000 * torch.rand(PLACES, 3, generator=torch.Generator().manual_seed(1))
    places = NearPlaces(points_n3, min_negative_m).to(local_BD.device) if min_negative_m else None
    loss = GlobalLoss(LossConfig(), config, near=places)
    step = int(queue.steps_M[-1]) + 1
    figures = measure(
        lambda: torch.autograd.grad(loss(local_BD, ids_B, queue, step=step).loss, local_BD), options.repeats
    )
    dist.destroy_process_group()
    return figures


def library(size: str, options: Options) -> dict[str, float]:
    """CrossBatchMemory with a full queue."""
    from pytorch_metric_learning.losses import CrossBatchMemory, MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    local_BD, ids_B, queue_MD, ids_M = inputs(size)
    ms = MultiSimilarityLoss(alpha=1, beta=50, base=0)
    memory = CrossBatchMemory(ms, queue_MD.shape[1], memory_size=1, miner=MultiSimilarityMiner(0.1))
    memory.memory_size, memory.embedding_memory, memory.label_memory = len(ids_M), queue_MD, ids_M
    memory.has_been_filled = True
    return measure(lambda: torch.autograd.grad(memory(local_BD, ids_B), local_BD), options.repeats)


def products(size: str, options: Options) -> dict[str, float]:
    """Similarities, then both gradients from a matrix of their shape."""
    local_BD, _, queue_MD, _ = inputs(size)
    local_BD = local_BD.detach()

    def step() -> None:
        similarity_BM = local_BD @ queue_MD.T
        similarity_BM @ queue_MD
        similarity_BM.T @ local_BD

    return measure(step, options.repeats)


def apart(part: str, size: str, options: Options) -> dict[str, float]:
    """The figures of one part from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_loss", "--part", part, "--sizes", size]
    command += ["--repeats", str(options.repeats), "--tile-mb", str(options.tile_mb)]
    return figures_of(command, f"{part} at {size}")


def main() -> None:
    """Prints the table; a process started for one part prints its figures."""
    options = tyro.cli(Options)
    if options.part != "all":
        parts = {"ours": ours, "near": near, "library": library, "products": products}
        print(json.dumps(parts[options.part](options.sizes[0], options)))
        return
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for size in options.sizes:
        b, m, _ = (int(n) for n in size.split("x"))
        own, bare = apart("ours", size, options), apart("products", size, options)
        apart_too = apart("near", size, options)
        fits = b * m * 16 * 4 <= options.library_gb * 2**30  # pairs of two int64, sorted values and their indices
        peer = apart("library", size, options) if fits else None
        over_bare = own["s"] / bare["s"]
        figures |= {f"{size}/seconds": own["s"], f"{size}/extra_bytes": own["bytes"], f"{size}/over_bare": over_bare}
        figures[f"{size}/min_negative_m_ratio"] = apart_too["s"] / own["s"]
        row = [size, f"{own['s']:.3f} ± {own['spread'] / 2:.3f}", f"{bare['s']:.3f}", f"{over_bare:.2f}"]
        row += [f"{own['bytes'] / 2**20:,.0f}", f"{apart_too['s'] / own['s']:.2f}"]
        if peer:
            speedup, memory = peer["s"] / own["s"], own["bytes"] / peer["bytes"]
            figures |= {f"{size}/speedup": speedup, f"{size}/memory_ratio": memory}
            row += [f"{peer['s']:.2f}", f"{peer['bytes'] / 2**20:,.0f}", f"{speedup:.1f}", f"{memory:.3f}"]
        else:
            row += ["not run", f"> {options.library_gb * 1024:,.0f}", "", ""]
        rows.append(row)
        if size == HEADLINE and peer:
            figures |= {"speedup": speedup, "memory_ratio": memory, "over_bare": over_bare}
    columns = ["B x M x D", "s", "3 products, s", "over bare", "extra MiB", "with min_negative_m, times"]
    columns += ["library, s", "library, MiB", "times faster", "share of its memory"]
    print_table("loss + queue, forward and backward", columns, rows)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
