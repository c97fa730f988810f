"""What a step of the global loss sends between ranks and how long it takes, for both placements of the queue.

Bytes are counted on the loopback interface, over all ranks, beside the formula; so nothing else may talk over it. From
the same formula follows a table on paper for many GPUs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from benchmarks.report import print_table, write_json
from configs.schema import LossConfig, MemoryConfig
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue

PLACEMENTS: tuple[Literal["replicated", "sharded"], ...] = ("replicated", "sharded")


@dataclass(frozen=True)
class Options:
    """Bytes sent and seconds a step of loss + queue at 1, 2 and 4 ranks; --paper adds the table for many GPUs."""

    batch: int = 512
    """N, images of a global step."""
    size: int = 65536
    """M, entries of the queue."""
    descriptor: int = 768
    """D."""
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4])
    """World sizes."""
    steps: int = 3
    """Measured steps, after one that warms up."""
    paper: bool = True
    """The table for 8 to 1,024 GPUs, by formula."""
    json: Path | None = None
    """File for the figures."""
    rank: int = -1
    """Used by the script for the processes that it starts."""
    store: str = ""
    """As above."""


def bytes_sent(
    world: int, batch: int, descriptor: int, placement: str, *, positives: int = 4, reduce_scatter: int = 1
) -> float:
    """Bytes that all ranks together send in a step (forward and backward) over rings.

    Both placements: descriptors (all-gather) and their gradients (reduce-scatter; gloo's sends as much as an
    all-reduce, `reduce_scatter` 2), N D floats each to W - 1 ranks; place ids. Sharded, all-reduced for each anchor:
    its similarities to its place's images, the hardest negative, the greatest exponent, the sum of exponentials and
    three figures of mining.
    """
    rows = (world - 1) * batch * ((1 + reduce_scatter) * 4 * descriptor + 8)
    if placement == "replicated":
        return float(rows)
    return float(rows + 2 * (world - 1) * batch * 4 * (positives + 6))


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def on_a_rank(options: Options) -> None:
    """Runs the steps as one of several ranks; rank 0 prints the figures."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks[0]))
    world = options.ranks[0]
    store = dist.FileStore(options.store, world)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=world)
    generator = torch.Generator().manual_seed(options.rank)
    local = F.normalize(torch.randn(options.batch // world, options.descriptor, generator=generator), dim=1)
    ids = torch.randperm(62_000, generator=generator)[: len(local) // 4].repeat_interleave(4)
    figures = {}
    for placement in PLACEMENTS:
        queue = MemoryQueue(options.size, options.descriptor, placement=placement)
        filler = torch.Generator().manual_seed(99)
        for step in range(-(-options.size // 4096)):
            rows = F.normalize(torch.randn(4096, options.descriptor, generator=filler), dim=1)
            queue.enqueue(rows, torch.randint(0, 62_000, (4096,), generator=filler), step)
        loss = GlobalLoss(LossConfig(), MemoryConfig(size=options.size, placement=placement))
        local.requires_grad_()
        torch.autograd.grad(loss(local, ids, queue, step=100).loss, local)
        seconds = []
        dist.barrier()
        sent = loopback_bytes()
        for _ in range(options.steps):
            began = time.perf_counter()
            torch.autograd.grad(loss(local, ids, queue, step=100).loss, local)
            seconds.append(time.perf_counter() - began)
        dist.barrier()
        figures[placement] = [(loopback_bytes() - sent) / options.steps, statistics.median(seconds)]
        del queue
    if options.rank == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def measured(world: int, options: Options) -> dict[str, list[float]]:
    """Bytes and seconds by placement at a world size."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.memory_scaling", "--ranks", str(world)]
        for name in ("batch", "size", "descriptor", "steps"):
            command += [f"--{name}", str(getattr(options, name))]
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--store", f"{folder}/store"], stdout=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        printed = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f"a rank of {world} ended with an error")
        figures: dict[str, list[float]] = json.loads(printed[0].splitlines()[-1])
        return figures


def paper() -> None:
    """The table for many GPUs: memory of the queue, bytes each GPU sends, time of loss and of sending."""
    flops, sends = 30e12, 25e9  # fp32 without tensor cores at about half of an H100's peak; 200 Gb/s a GPU
    per_gpu, descriptor = 64, 768
    rows = []
    for world in (8, 64, 256, 1024):
        for size in (65_536, 1_048_576, 10_000_000):
            batch = per_gpu * world
            row = [str(world), f"{batch:,}", f"{size:,}"]
            for placement in PLACEMENTS:
                held = size * 4 * descriptor / (world if placement == "sharded" else 1) + size * 16
                sent = bytes_sent(world, batch, descriptor, placement) / world
                row += [f"{held / 2**30:.2f}", f"{sent / 2**20:.1f}", f"{1e3 * sent / sends:.1f}"]
            computed = 2 * 2 * per_gpu * (batch + size) * descriptor + 2 * per_gpu * batch * descriptor
            rows.append([*row, f"{1e3 * computed / flops:.1f}"])
    columns = ["GPUs", "N", "M"]
    for placement in PLACEMENTS:
        columns += [f"{placement}: GiB", "MiB sent", "ms sending"]
    print_table(
        f"on paper: {per_gpu} images, {sends / 1e9:.0f} GB/s and {flops / 1e12:.0f} TFLOP/s a GPU, D {descriptor}",
        [*columns, "ms computing"],
        rows,
    )


def main() -> None:
    """Prints the measured table and the one on paper."""
    options = tyro.cli(Options)
    if options.rank >= 0:
        on_a_rank(options)
        return
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for world in options.ranks:
        for placement, (sent, seconds) in measured(world, options).items():
            formula = bytes_sent(world, options.batch, options.descriptor, placement, reduce_scatter=2)
            rows.append([placement, str(world), f"{sent / 2**20:.3f}", f"{formula / 2**20:.3f}", f"{seconds:.3f}"])
            figures |= {f"{placement}/{world}/bytes": sent, f"{placement}/{world}/formula_bytes": formula}
            figures[f"{placement}/{world}/seconds"] = seconds
    title = f"loss + queue, N {options.batch}, M {options.size}, D {options.descriptor}, gloo on one machine"
    print_table(title, ["placement", "ranks", "MiB sent a step, all ranks", "by formula", "s a step"], rows)
    if options.paper:
        paper()
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
