"""A folder with noise to shard, a benchmark of noise, and a recipe whose curve does not depend on where it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.photos import write_gsv_cities, write_noise_benchmark

ROOT = Path(__file__).resolve().parent.parent.parent


def write_workplace(folder: Path) -> Path:
    """Writes native/, town/ and recipe.yaml; a constant schedule: a shorter run is a longer one's start."""
    write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(9), 4), "Bergen": dict.fromkeys(range(8), 5)})
    write_noise_benchmark(folder / "town")
    recipe = {
        "name": "noise",
        "data": {"shards": str(folder / "shards"), "places_per_batch": 4, "images_per_place": 3, "image_size": 28},
        "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
        "memory": {"size": 30, "start_epoch": 1, "placement": "sharded"},
        "engine": {"timeout_s": 30},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "schedule": "none"},
        "trainer": {"epochs": 10000, "checkpoint_every_steps": 20, "validate_every_epochs": 0},
        "eval": {
            "benchmarks": ["town"],
            "data_root": str(folder),
            "image_size": 28,
            "pictures": 0,
            "recall_at": [1, 5],
        },
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def environment() -> dict[str, str]:
    """One thread a process; this checkout before any other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def rerankvpr(folder: Path, *argv: str, timeout_s: float = 300, **env: str) -> str:
    """Runs the command in `folder` and returns what it printed; raises with it if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "rerankvpr", *argv],
        cwd=folder,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(output: Path) -> dict[int, float]:
    """Training loss by step; of a step that was done twice, the last."""
    path = output / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def steps_done_twice(output: Path) -> int:
    """Steps in metrics.jsonl beyond the first time each was done: the work that interruptions cost."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    return len(steps) - len(set(steps))
