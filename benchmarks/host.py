"""The host's own time of a training step: what Python, launches and waits take while a GPU would be idle or late.

The product's own loader, augmentation, network, loss, queue and engine on the CPU, nearly all arithmetic taken out: 60
images of one patch (14 px) through `tiny14`. What is left is the host's, and is paid in each step on any device.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.giant import write_noise
from configs.schema import Recipe
from memory.global_loss import GlobalLoss
from trainer.batches import Batches
from trainer.process_group import start_process_group, stop_process_group
from trainer.state import build_state
from trainer.step import TrainingStep

PLACES, VIEWS, WARM = 15, 4, 10


def host_ms(folder: Path, *, steps: int, zero_stage: int) -> dict[str, float]:
    """Median and 90th percentile of a step's milliseconds, without the wait for its data; joins a process group."""
    recipe = Recipe.model_validate(
        {
            "name": "host",
            "output": folder / "run",
            "data": {
                **{"shards": str(folder / "shards"), "places_per_batch": PLACES, "images_per_place": VIEWS},
                **{"image_size": 14, "composition": "mixed", "decode_threads": 1},
            },
            "model": {"backbone": "tiny14", "weights": "random"},
            "memory": {"size": 4096, "start_epoch": 0, "decay_lambda": 0.1},
            "engine": {"zero_stage": zero_stage},
            "trainer": {"epochs": 10**6, "max_steps": WARM + steps},
            "tracking": {"enabled": False},
        }
    )
    rank = start_process_group(600)
    torch.set_num_threads(1)
    state = build_state(recipe, rank, images_per_rank=PLACES * VIEWS)
    batches = Batches(recipe, rank)
    watchdog: Any = SimpleNamespace(enter=lambda *_: None)
    context: Any = SimpleNamespace(recipe=recipe, watchdog=watchdog)
    loss = GlobalLoss(recipe.loss, recipe.memory)
    step = TrainingStep(context, loss, state, steps_per_epoch=batches.steps_per_epoch)
    taken = []
    for batch, _ in batches.from_step(0, watchdog):
        began = time.perf_counter()
        step(batch, 1e-5)
        taken.append(1e3 * (time.perf_counter() - began))
        state.progress.step += 1
    stop_process_group()
    taken = sorted(taken[WARM:])
    return {"host_ms": statistics.median(taken), "host_p90_ms": taken[len(taken) * 9 // 10]}


def main(steps: int = 200, zero_stage: int = 1) -> dict[str, float]:
    """Measures and returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), places=4 * PLACES, size=(28, 28))
        return host_ms(Path(folder), steps=steps, zero_stage=zero_stage)


if __name__ == "__main__":
    print(json.dumps(main()))
