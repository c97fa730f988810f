"""Images per second and MFU of training steps by backbone, trained blocks and compilation, without a loader.

The trainer's own model, engine, loss and queue, one rank. Figures are written after each setting, so that a run that is
cut short keeps what it has. `python -m benchmarks.throughput [--json FILE]`; on a CPU give a small `--backbones`.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.report import print_table, write_json
from configs.schema import EngineConfig, ModelConfig, Recipe
from data_pipeline.images import normalise
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue
from model.network import PlaceModel, build_model
from trainer.engine import build_engine, clip_and_update, set_learning_rate
from trainer.flops import device_peak_tflops, model_flops
from trainer.process_group import Rank, start_process_group, stop_process_group

GPU_BATCH = {"vits14": 512, "vitb14": 256, "vitl14": 96, "vitg14": 24}
CPU_BATCH = 8


@dataclass(frozen=True)
class Options:
    """Times training steps of each setting on one rank."""

    backbones: list[str] = field(default_factory=lambda: list(GPU_BATCH))
    """Backbones, random weights."""
    trained: list[Literal["last4", "all"]] = field(default_factory=lambda: ["last4", "all"])
    """Blocks that are trained."""
    compiled: list[bool] = field(default_factory=lambda: [False, True])
    """Eager blocks, and blocks through torch.compile."""
    compile_backend: str = "inductor"
    """torch.compile's backend."""
    checkpointing: bool = False
    """Activation checkpointing."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """engine.precision."""
    image_size: int = 224
    """Side of the images in pixels."""
    batch: int = 0
    """Images per step; 0: what fits 80 GB on a GPU, 8 on a CPU."""
    queue: int = 16384
    """Entries of the memory queue, empty at first."""
    steps: int = 20
    """Measured steps, after three that warm up; the median counts."""
    seconds: float = math.inf
    """No setting starts after this many seconds."""
    json: Path | None = None
    """File for the figures, written after each setting."""


def steps_per_setting(rank: Rank, backbone: str, trained: str, compiled: bool, options: Options) -> tuple[int, float]:
    """Images of a step and its median seconds, the device's work finished at each mark."""
    recipe = recipe_of(backbone, trained, options)
    images = options.batch or (GPU_BATCH.get(backbone, CPU_BATCH) if rank.device.type == "cuda" else CPU_BATCH)
    model: PlaceModel = build_model(recipe.model)
    model.activation_checkpointing = options.checkpointing
    queue = MemoryQueue(options.queue, model.descriptor_size, rank.device)
    engine = build_engine(model, engine=recipe.engine, optim=recipe.optim, images_per_rank=images)
    if compiled:
        model.compile_blocks(options.compile_backend)
    loss = GlobalLoss(recipe.loss, recipe.memory)
    shape = (images, 3, options.image_size, options.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=rank.device)
    ids = torch.arange(images // 4, device=rank.device).repeat_interleave(4)
    seconds = []
    for step in range(3 + options.steps):
        began = time.perf_counter()
        engine.train()
        set_learning_rate(engine, 1e-5)
        out = loss(engine(normalise(pixels)), ids + step * images, queue, step=step)
        engine.backward(out.loss)
        clip_and_update(engine, recipe.optim.gradient_clipping)
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return images, statistics.median(seconds[3:])


def recipe_of(backbone: str, trained: str, options: Options) -> Recipe:
    """A recipe with the setting's network and engine; all else by default."""
    finetune = {"finetune": "all"} if trained == "all" else {"finetune_last_n_blocks": 4}
    return Recipe.model_validate(
        {
            "data": {"image_size": options.image_size},
            "model": ModelConfig.model_validate({"backbone": backbone, "weights": "random", **finetune}),
            "engine": EngineConfig(precision=options.precision, activation_checkpointing=options.checkpointing),
            "memory": {"size": options.queue},
        }
    )


def measure(rank: Rank, options: Options) -> dict[str, float]:
    """Prints the table and returns `{backbone/trained/mode/figure: number}`."""
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    began = time.monotonic()
    settings = [(b, t, c) for c in options.compiled for t in options.trained for b in options.backbones]
    for backbone, trained, compiled in settings:
        key = f"{backbone}/{trained}/{'compiled' if compiled else 'eager'}"
        if time.monotonic() - began > options.seconds:
            rows.append([key, "", "not run: out of time", ""])
            continue
        gc.collect()  # an engine refers to itself
        if rank.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            images, seconds = steps_per_setting(rank, backbone, trained, compiled, options)
        except torch.OutOfMemoryError:
            rows.append([key, "", "out of memory", ""])
            continue
        figures |= {f"{key}/images_per_s": images / seconds, f"{key}/step_s": seconds}
        recipe = recipe_of(backbone, trained, options)
        peak = device_peak_tflops(recipe)
        mfu = images * model_flops(recipe) / seconds / (peak * 1e12) if peak else None
        figures |= {f"{key}/mfu": mfu} if mfu else {}
        if rank.device.type == "cuda":
            figures[f"{key}/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append([key, str(images), f"{images / seconds:.1f}", f"{mfu:.1%}" if mfu else "peak not known"])
        write_json(options.json, figures)
    title = f"training steps, {options.precision}, {options.image_size} px, images already on {rank.device.type}"
    print_table(title, ["setting", "images per step", "images/s", "MFU"], rows)
    return figures


def main() -> None:
    """Prints the table."""
    options = tyro.cli(Options, prog="python -m benchmarks.throughput")
    rank = start_process_group(1800)
    write_json(options.json, measure(rank, options))
    stop_process_group()


if __name__ == "__main__":
    main()
