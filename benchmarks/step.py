"""Where the seconds of a training step go, what queue and gather add to the bare model, how long a checkpoint stalls.

The trainer's own loader, engine, loss, queue and checkpoint writer, on JPEGs of noise (400 x 300) in tar shards. The
loss's gradient by descriptors is taken by itself, so that gather, loss and queue, both ways, are timed apart from the
network. Images per second and MFU by backbone are in benchmarks/throughput.py.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro

from benchmarks.batches import endless, plans_and_loader
from benchmarks.giant import write_noise
from benchmarks.report import figures_of, print_table, write_json
from configs.schema import DataConfig, EngineConfig, EvalConfig, MemoryConfig, ModelConfig, Recipe
from data_pipeline.images import normalise
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue
from model.network import build_model
from trainer.checkpoint import checkpoint_contents, recipe_files
from trainer.checkpoint_writer import CheckpointWriter
from trainer.engine import build_engine, clip_and_update, set_learning_rate
from trainer.process_group import start_process_group, stop_process_group
from trainer.state import Progress, TrainingState

PARTS = ("data wait", "forward", "wait for ranks", "gather + loss + queue", "backward", "optimizer")
NETWORK = ("forward", "backward", "optimizer")
OF_OVERLAP = ("step_s", "step_s_with_overlap", "ratio", "ratio_least", "ratio_most")


@dataclass(frozen=True)
class Options:
    """Times steps of ViT-S/14 at 224 px on 1 and 2 ranks."""

    ranks: list[int] = field(default_factory=lambda: [1, 2])
    """World sizes."""
    places: int = 8
    """Places of a global batch, of 4 images each."""
    size: int = 16384
    """M, entries of the queue, full before the first step."""
    steps: int = 8
    """Measured steps, after two that warm up."""
    backbone: str = "vits14"
    """Backbone, random weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """engine.precision."""
    host: bool = False
    """The host's own milliseconds of a step instead: tiny14, 60 images of one patch, ZeRO 1, one thread."""
    overlap: bool = False
    """What engine.overlap does instead: two ranks, all blocks trained, steps with it and without in turns."""
    overlap_buckets: int = 8
    """Buckets of gradients in a step of that comparison."""
    image_size: int = 224
    """Side in pixels of that comparison."""
    json: Path | None = None
    """File for the figures."""
    worker: str = ""
    """Used by the script for the processes that it starts: the folder of the data."""


class Clock:
    """Seconds of a step by part, the device's queue of work emptied at each mark."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.last = self.now()

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, part: str) -> None:
        """Ends a part."""
        now = self.now()
        self.seconds[part].append(now - self.last)
        self.last = now


def recipe_of(options: Options, folder: Path) -> Recipe:
    """Last 4 blocks, as configs/mini_vits.yaml trains them."""
    return Recipe(
        name="step",
        output=folder / "run",
        data=DataConfig(
            shards=str(folder / "shards"), places_per_batch=options.places, composition="mixed", decode_threads=1
        ),
        model=ModelConfig.model_validate({"backbone": options.backbone, "weights": "random"}),
        engine=EngineConfig(precision=options.precision),
        memory=MemoryConfig(size=options.size, start_epoch=0, decay_lambda=0.1),
        eval=EvalConfig(),
    )


def on_a_rank(options: Options) -> None:
    """Runs steps as one rank; rank 0 prints the figures."""
    rank = start_process_group(600)
    recipe = recipe_of(options, Path(options.worker))
    batch_size = options.places * recipe.data.images_per_place
    model = build_model(recipe.model)
    queue = MemoryQueue(recipe.memory.size, model.descriptor_size, rank.device)
    filler = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(options.size, model.descriptor_size, generator=filler))
    queue.enqueue(rows.to(rank.device), 100 + torch.arange(options.size, device=rank.device), 0)
    engine = build_engine(
        model, engine=recipe.engine, optim=recipe.optim, images_per_rank=batch_size // rank.world_size
    )
    loss = GlobalLoss(recipe.loss, recipe.memory)
    batches = endless(*plans_and_loader(recipe.data, rank=rank.rank, world_size=rank.world_size))
    writer = CheckpointWriter(recipe.output / "checkpoints", keep_last=1, say=lambda text: print(text, file=sys.stderr))
    clock, totals = Clock(), []
    num_steps, saved_after = 2 + options.steps + 4, 2 + options.steps
    for step in range(num_steps):
        began = clock.last = clock.now()
        batch = next(batches)
        clock.mark("data wait")
        engine.train()
        set_learning_rate(engine, 1e-5)
        descriptors = engine(normalise(batch.images_B3HW.to(rank.device)))
        clock.mark("forward")
        dist.barrier()
        clock.mark("wait for ranks")
        leaf = descriptors.detach().requires_grad_()  # DeepSpeed takes any gradient of its output for the backward pass
        out = loss(leaf, batch.place_ids_B.to(rank.device), queue, step=step)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
        clock.mark("gather + loss + queue")
        engine.backward((descriptors * grad).sum())
        clock.mark("backward")
        clip_and_update(engine, recipe.optim.gradient_clipping)
        clock.mark("optimizer")
        votes = torch.tensor(writer.vote(), device=rank.device)
        dist.all_reduce(votes)
        writer.settle(*votes.tolist())
        if step == saved_after:
            writer.begin(
                step, checkpoint_contents(TrainingState(engine, queue, None, Progress(step)), recipe_files(recipe))
            )
        totals.append(clock.now() - began)
    writer.finish()
    figures = {part: statistics.median(clock.seconds[part][2:saved_after]) for part in PARTS}
    figures["step"] = statistics.median(totals[2:saved_after])
    figures["stall"] = max(totals[saved_after:]) - figures["step"]
    if rank.is_main:
        print(json.dumps(figures))
    stop_process_group()


def measured(world: int, options: Options) -> dict[str, float]:
    """Median seconds by part at a world size."""
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), places=3 * options.places, size=(400, 300))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += ["-m", "benchmarks.step", "--worker", folder, "--places", str(options.places)]
        command += ["--size", str(options.size), "--steps", str(options.steps)]
        command += ["--backbone", options.backbone, "--precision", options.precision]
        threads = str(max(1, (os.cpu_count() or 1) // world))
        return figures_of(command, f"the run on {world} rank(s)", {**os.environ, "OMP_NUM_THREADS": threads})


def compare_overlap(options: Options) -> dict[str, float]:
    """Prints a step with engine.overlap beside one without, at ZeRO 1 and 2; returns the figures."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.overlap", "--backbone", options.backbone, "--places", str(options.places)]
    command += ["--side", str(options.image_size), "--steps", str(options.steps)]
    command += ["--buckets", str(options.overlap_buckets)]
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    figures = figures_of(command, "the run on 2 ranks", {**os.environ, "OMP_NUM_THREADS": threads})
    rows = []
    for stage in (1, 2):
        seconds, overlapped, *ratios = (figures[f"zero_{stage}/{name}"] for name in OF_OVERLAP)
        reduces = [figures[f"zero_{stage}/{name}"] for name in ("all_reduces", "all_reduces_with_overlap")]
        row = [str(stage), ", ".join(f"{x:.0f}" for x in reduces), f"{seconds:.3f}", f"{overlapped:.3f}"]
        rows.append([*row, "{:.3f} ({:.3f} to {:.3f})".format(*ratios)])
    title = (
        f"seconds of a step without engine.overlap and with it, {options.steps} of each in turns: {options.backbone}, "
        f"{options.image_size} px, all blocks, {options.places} places x 4, two ranks"
    )
    columns = ["ZeRO", "all-reduces, without and with", "without", "with", "with / without"]
    print_table(title, columns, rows)
    return figures


def main() -> None:
    """Prints the split of a step at each world size."""
    options = tyro.cli(Options)
    if options.worker:
        on_a_rank(options)
        return
    if options.overlap:
        write_json(options.json, compare_overlap(options))
        return
    if options.host:
        figures = figures_of([sys.executable, "-m", "benchmarks.host"], "the run")
        rows = [["step", f"{figures['host_ms']:.2f}", f"{figures['host_p90_ms']:.2f}"]]
        print_table("milliseconds of the host in a step of tiny14, 60 images", ["", "median", "90 %"], rows)
        write_json(options.json, figures)
        return
    rows = []
    figures = {}
    for world in options.ranks:
        seconds = measured(world, options)
        bare = sum(seconds[part] for part in NETWORK)
        overhead = seconds["gather + loss + queue"] / bare
        cells = [f"{seconds[part]:.3f}" for part in PARTS]
        rows.append([str(world), *cells, f"{seconds['step']:.3f}", f"{overhead:.2%}", f"{seconds['stall']:.3f}"])
        figures |= {f"{world}/{part.replace(' ', '_').replace('+', 'and')}_s": seconds[part] for part in PARTS}
        figures |= {f"{world}/step_s": seconds["step"], f"{world}/queue_overhead": overhead}
        figures[f"{world}/checkpoint_stall_s"] = seconds["stall"]
    figures["queue_overhead"] = max(figures[f"{world}/queue_overhead"] for world in options.ranks)
    figures["checkpoint_stall_s"] = max(figures[f"{world}/checkpoint_stall_s"] for world in options.ranks)
    title = (
        f"seconds of a step, median of {options.steps}: {options.backbone}, 224 px, last 4 blocks, "
        f"{options.places} places x 4, queue {options.size}, ZeRO 1, {options.precision}, JPEGs of noise"
    )
    columns = ["ranks", *PARTS, "step", "gather + loss + queue / network", "checkpoint stall"]
    print_table(title, columns, rows)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
