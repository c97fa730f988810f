"""Index builds and additions killed at random moments must finish, and end with the bytes of unbroken ones."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.dinov2 import facebook_layout
from tests.forked import Command
from tests.networks import backbone
from tests.photos import write_noise_benchmark

FLAGS = ("--image-size", "56", "--batch-size", "1", "--rerank.top-k", "4", "--factory", "IVF2,Flat")


def write_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """A tiny network, photographs to build from and photographs to add."""
    torch.manual_seed(0)
    weights = folder / "tiny.safetensors"
    save_file(facebook_layout(dict(backbone("tiny14", "random").state_dict())), weights)
    write_noise_benchmark(folder)
    return weights, folder / "images" / "test" / "database", folder / "images" / "test" / "queries"


def bytes_of(index: Path) -> dict[str, bytes]:
    """The files of an index by name, hidden ones apart."""
    files = (path for path in sorted(index.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(index).as_posix(): path.read_bytes() for path in files}


def verbs(weights: Path, database: Path, more: Path, out: Path) -> list[list[str]]:
    """What makes an index and adds to it."""
    build = ["index", "build", str(database), "--checkpoint", str(weights), "--out", str(out), *FLAGS]
    return [build, ["index", "add", str(out), str(more)]]


def run(folder: Path, verb: Sequence[str]) -> float:
    """Runs a verb to its end; the seconds that it took."""
    began = time.monotonic()
    command = Command(folder, "rerankvpr", *verb)
    assert command.wait(timeout=120) == 0, command.output()
    return time.monotonic() - began


def run_killed(folder: Path, verb: Sequence[str], after_s: float) -> bool:
    """Runs a verb and kills it; whether it was killed before its end."""
    command = Command(folder, "rerankvpr", *verb)
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.communicate(timeout=after_s)
    killed = command.poll() is None
    command.send_signal(signal.SIGKILL)
    command.wait(timeout=60)
    return killed


def check_killed_at(folder: Path, moments: int, seed: int = 0) -> None:
    """Kills each verb at so many moments spread over its time, each time in an index of its own state before."""
    weights, database, more = write_inputs(folder)
    whole = folder / "whole"
    seconds = [run(folder, verb) for verb in verbs(weights, database, more, whole)]
    expected, draw = bytes_of(whole), random.Random(seed)
    out = folder / "killed"
    killed = 0
    for verb, took in zip(verbs(weights, database, more, out), seconds, strict=True):
        for moment in range(moments):
            killed += run_killed(folder, verb, took * (moment + draw.random()) / moments)
        run(folder, verb)
    assert killed
    assert bytes_of(out) == expected
