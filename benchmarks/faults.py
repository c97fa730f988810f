"""Effective training time under injected failures: all ranks killed at an interval, restarted by a plain loop.

`python -m benchmarks.faults` trains a small ViT on the rendered town with two ranks for `--minutes`. Every `--every`
seconds launcher and ranks get SIGKILL, and the same command with `--resume` is run again at once. Effective training
time is what the steps that were kept would have taken without failures (their number times the median seconds of a
step), as a share of all time; the rest is start-up, reading the checkpoint and steps done twice.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
import yaml

from benchmarks.report import print_table, write_json
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town
from trainer.checkpoint_folder import newest_valid

RANKS = 2


@dataclass(frozen=True)
class Options:
    """Effective training time under SIGKILL to all ranks at an interval, and restarts by a plain loop."""

    minutes: float = 10
    """How long to train."""
    every: float = 60
    """Seconds from one failure to the next."""
    checkpoint_every: int = 20
    """Steps from one checkpoint to the next."""
    json: Path | None = None
    """File for the figures."""


def prepare(folder: Path, checkpoint_every: int) -> Path:
    """Shards and a recipe that never ends."""
    render_town(folder / "town", Town(seed=3, places=48, views=4, held_out_places=0), processes=1)
    write_shards(read_gsv_cities(folder / "town" / "train", min_images_per_place=4), folder / "shards")
    recipe: dict[str, Any] = {
        "name": "faults",
        "output": str(folder / "run"),
        "data": {
            "shards": str(folder / "shards"),
            "places_per_batch": 16,
            "images_per_place": 4,
            "image_size": 84,
            "composition": "mixed",
            "decode_threads": 1,
        },
        "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem"},
        "memory": {"size": 512, "start_epoch": 1},
        "trainer": {"epochs": 100_000, "validate_every_epochs": 0, "checkpoint_every_steps": checkpoint_every},
        "tracking": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path) -> subprocess.Popen[bytes]:
    """The training, from its newest checkpoint."""
    command = [sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", str(RANKS), "--"]
    return subprocess.Popen(
        [*command, "train", str(recipe), "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and all ranks."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    """Trains, kills, and prints what was kept."""
    options = tyro.cli(Options, prog="python -m benchmarks.faults")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder, options.checkpoint_every)
        metrics = folder / "run" / "metrics.jsonl"
        began, failures = time.monotonic(), 0
        restarts_s: list[float] = []
        while (left := options.minutes * 60 - (time.monotonic() - began)) > 1:
            launched, size = time.monotonic(), metrics.stat().st_size if metrics.exists() else 0
            process = start(recipe)
            end = launched + min(options.every, left)
            while time.monotonic() < end:
                if process.poll() is not None:
                    sys.exit("the training ended by itself; run the same recipe by hand to see why")
                if len(restarts_s) == failures and metrics.exists() and metrics.stat().st_size > size:
                    restarts_s.append(time.monotonic() - launched)
                time.sleep(0.05)
            kill(process)
            failures += 1
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
        steps = [line for line in lines if "train/step_s" in line]
        done, step_s = len(steps), statistics.median(line["train/step_s"] for line in steps)
        found, _ = newest_valid(folder / "run" / "checkpoints")
        kept = int(found.name.removeprefix("step-")) if found else 0
    figures = {
        "failures": float(failures),
        "seconds": seconds,
        "steps_kept": float(kept),
        "steps_done": float(done),
        "step_s": step_s,
        "restart_s": statistics.median(restarts_s),
        "effective_training_time": kept * step_s / seconds,
    }
    title = f"{RANKS} ranks, SIGKILL to all every {options.every:g} s for {options.minutes:g} min"
    print_table(title, ("figure", "value"), [(name, f"{value:.3f}") for name, value in figures.items()])
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
