"""Whole trainings in real processes, as tests start, kill and compare them."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests import forked
from tests.photos import write_gsv_cities, write_noise_benchmark
from tests.ports import free_port
from tests.stores import new_store

ROOT = forked.ROOT
TIMEOUT_S = 300
STEPS = 12  # 3 epochs of 4 steps; the queue starts with the second


def make_workplace(folder: Path) -> None:
    """Shards, a benchmark of noise, and a recipe that visits every part of a training."""
    write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(9), 4), "Bergen": dict.fromkeys(range(8), 5)})
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    write_noise_benchmark(folder / "town")
    recipe = {
        "name": "test",
        "data": {"shards": str(folder / "shards"), "places_per_batch": 4, "images_per_place": 3, "image_size": 28},
        "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
        "memory": {"size": 30, "start_epoch": 1, "placement": "sharded", "decay": "measured", "drift_every": 2},
        "engine": {"encode_chunks": 2, "peak_tflops": 0.5},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "trainer": {"epochs": 3, "checkpoint_every_steps": 2, "validate_every_epochs": 1, "log_negatives_every": 2},
        "eval": {"benchmarks": ["town"], "data_root": str(folder), "image_size": 28, "pictures": 0},
        "tracking": {"uri": "sqlite:///mlflow.db"},
    }
    new_store(folder / "mlflow.db")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


class ForkedRanks:
    """Ranks of a training without a launcher, forked warm; it behaves as the launcher's process does."""

    def __init__(self, folder: Path, world_size: int, *command: str) -> None:
        """`python -m ...` as each rank."""
        group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = [
            forked.Command(folder, *command, environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)
        ]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """0 once all ranks have ended well, the status of one that did not, after killing the others; else None."""
        if self.returncode is None:
            statuses = [rank.poll() for rank in self.ranks]
            failed = next((status for status in statuses if status), None)
            if failed is not None:
                self.kill()
                self.returncode = failed
            elif None not in statuses:
                self.returncode = 0
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What all ranks printed, once they have ended, and nothing. Raises subprocess.TimeoutExpired."""
        if not forked.wait_until(lambda: self.poll() is not None, timeout):
            raise subprocess.TimeoutExpired(list(self.ranks[0].args), timeout)
        return "".join(rank.output()[0] for rank in self.ranks), ""

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        for rank in self.ranks:
            rank.kill()


Process = forked.Command | ForkedRanks


def kill_all(process: Process) -> None:
    """SIGKILL to the launcher, if there is one, and all ranks, which are not in its process group."""
    if isinstance(process, ForkedRanks):
        process.kill()
        return
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ranks end with the fork server that they come from
            victim.send_signal(signal.SIGKILL)
    process.wait()


def ranks_of(process: forked.Command | subprocess.Popen[str], verb: str = "train") -> list[psutil.Process]:
    """The ranks of a `rerankvpr launch ... -- VERB`, in their order."""
    family = psutil.Process(process.pid).children(recursive=True)
    return sorted((one for one in family if verb in one.cmdline()), key=lambda one: one.pid)


def finish(process: Process, timeout: float = TIMEOUT_S) -> str:
    """What a training printed, once it has come to its end."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == 0, output
    return output


def two_ranks(workplace: Path, output: str, *flags: str) -> forked.Command:
    """By the launcher, as a user starts it."""
    launcher = ("rerankvpr", "launch", "--nproc-per-node", "2", "--")
    return forked.Command(workplace, *launcher, "train", *_arguments(workplace, workplace / output), *flags)


def warm_ranks(workplace: Path, output: str, *flags: str, world_size: int = 2) -> ForkedRanks:
    """The same without the launcher."""
    return ForkedRanks(workplace, world_size, "trainer", *_arguments(workplace, workplace / output), *flags)


def faulty_ranks(workplace: Path, output: Path, faults: dict[str, object], *flags: str) -> ForkedRanks:
    """Two ranks in which something goes wrong (see tests.faulty)."""
    return ForkedRanks(workplace, 2, "tests.faulty", json.dumps(faults), *_arguments(workplace, output), *flags)


def one_rank(workplace: Path, output: str, *flags: str) -> ForkedRanks:
    """One process, untracked."""
    return warm_ranks(workplace, output, "--tracking.enabled", "False", *flags, world_size=1)


def _arguments(workplace: Path, output: Path) -> Sequence[str]:
    return str(workplace / "recipe.yaml"), "--output", str(output)


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


def same_run(a: Path, b: Path, steps: int) -> None:
    """Asserts that two trainings of so many steps end with the same bits and had the same losses."""
    assert last_checkpoint(a).name == last_checkpoint(b).name
    same_state(last_checkpoint(a), last_checkpoint(b))
    one, other = logged(a), logged(b)
    assert sorted(one) == sorted(other) == list(range(1, steps + 1))
    assert [one[s]["train/loss"] for s in sorted(one)] == [other[s]["train/loss"] for s in sorted(other)]


def train_with_kills(
    workplace: Path,
    output: str,
    *flags: str,
    kills: int,
    within_s: float,
    most_steps: int = 1,
    seed: int = 0,
    kill: Callable[[forked.Command], None] = kill_all,
) -> int:
    """A training on two ranks to its end, killed up to `kills` times, by SIGKILL to all processes; how often it was.

    Each comes within `within_s` after one of the `most_steps` steps that follow the last one that was done, both drawn:
    a resumption has to get on, on a machine of any speed. `kill` is another way to end the training.
    """
    rng, folder = random.Random(seed), workplace / output
    metrics = folder / "metrics.jsonl"
    process, done = two_ranks(workplace, output, *flags, "--resume"), 0
    while done < kills:
        target = last_step(metrics) + rng.randint(1, most_steps)
        forked.wait_until(lambda: process.poll() is not None or last_step(metrics) >= target, 180)  # noqa: B023
        time.sleep(rng.uniform(0.0, within_s))
        if process.poll() is not None:
            break  # came to its end between two kills
        kill(process)
        if process.returncode == 0:
            return done  # in its last moment, when all was done
        done += 1
        print(f"kill {done}: at step {last_step(metrics)}", flush=True)
        process = two_ranks(workplace, output, *flags, "--resume")
    finish(process)
    return done


def last_step(metrics: Path) -> int:
    """The highest step that a training has done, of the lines that are whole; 0 before the first."""
    text = metrics.read_text() if metrics.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max((line["step"] for line in whole if "train/loss" in line), default=0)
