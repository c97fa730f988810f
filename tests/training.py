"""Whole trainings in real processes, as tests start, kill and compare them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from safetensors.torch import load_file

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.photos import jpeg, write_gsv_cities

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300
STEPS = 12  # 3 epochs of 4 steps; the queue starts with the second


def make_workplace(folder: Path) -> None:
    """Shards, a benchmark of noise, and a recipe that visits every part of a training."""
    write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(9), 4), "Bergen": dict.fromkeys(range(8), 5)})
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    rng = np.random.default_rng(0)
    for part, count in (("database", 7), ("queries", 5)):
        images = folder / "town" / "images" / "test" / part
        images.mkdir(parents=True)
        for i in range(count):
            (images / f"@{500000 + 100 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg").write_bytes(jpeg(rng))
    recipe = {
        "name": "test",
        "data": {"shards": str(folder / "shards"), "places_per_batch": 4, "images_per_place": 3, "image_size": 28},
        "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
        "memory": {"size": 30, "start_epoch": 1, "placement": "sharded", "decay": "measured", "drift_every": 2},
        "engine": {"encode_chunks": 2, "peak_tflops": 0.5},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "trainer": {"epochs": 3, "checkpoint_every_steps": 2, "validate_every_epochs": 1},
        "eval": {"benchmarks": ["town"], "data_root": str(folder), "image_size": 28, "pictures": 2},
        "tracking": {"uri": "sqlite:///mlflow.db"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    """`python -m ...` in a folder of its own, where MLflow puts its artifacts."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all ranks, which are not in its process group."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == 0, output
    return output


def two_ranks(workplace: Path, output: str, *flags: str) -> subprocess.Popen[str]:
    recipe = str(workplace / "recipe.yaml")
    launcher = ("rerankvpr", "launch", "--nproc-per-node", "2", "--")
    return start(workplace, *launcher, "train", recipe, "--output", str(workplace / output), *flags)


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Training metrics by step; of a step that was done twice, the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def same_state(a: Path, b: Path) -> None:
    """Asserts that two checkpoints hold the same bits: weights, optimizer, queue and random state of all ranks."""
    names = sorted(file.name for file in a.glob("*.safetensors"))
    assert names == sorted(file.name for file in b.glob("*.safetensors"))
    assert {name.split("-")[0] for name in names} >= {"model", "optimizer", "queue", "random"}
    for name in names:
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys(), name
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert (a / "optimizer.json").read_text() == (b / "optimizer.json").read_text()


def faulty_ranks(workplace: Path, output: Path, faults: dict[str, object], *flags: str) -> subprocess.Popen[str]:
    """Two ranks in which something goes wrong (see tests.faulty)."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.faulty")
    recipe = str(workplace / "recipe.yaml")
    return start(workplace, *launcher, json.dumps(faults), recipe, "--output", str(output), *flags)


def one_rank(workplace: Path, output: str, *flags: str) -> subprocess.Popen[str]:
    """By torchrun on the trainer's module, untracked."""
    return start(
        workplace,
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "trainer"),
        *(str(workplace / "recipe.yaml"), "--output", str(workplace / output), "--tracking.enabled", "False"),
        *flags,
    )
