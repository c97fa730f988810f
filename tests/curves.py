"""Loss curves of trainings in the process group of a check, and the files of tests/golden that they are held to.

RERANKVPR_WRITE_GOLDEN=1 writes these files anew, in a group of one process.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from configs.schema import Recipe
from tests.ranks import shared_folder

Curve = list[list[float]]  # loss and gradient norm by step
FOLDER = Path(__file__).parent / "golden"
PILLOW = int(PIL.__version__.partition(".")[0])


@contextmanager
def folder_of_trainings() -> Iterator[Path]:
    """A folder that all ranks know; it goes when all of them are done."""
    folder = shared_folder()
    yield folder
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def curve(folder: Path, name: str, recipe: Mapping[str, Any], *, resume: bool = False) -> Curve:
    """Loss and gradient norm by step of a training in this process group, with its output in `folder`/`name`."""
    from trainer.loop import train
    from trainer.process_group import Rank
    from trainer.resume import Resume

    rank = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    validated = Recipe.model_validate({"output": str(folder / name), **recipe})
    train(validated, rank, Console(quiet=True), resume=Resume() if resume else None)
    dist.barrier()
    return [[line["train/loss"], line["train/grad_norm"]] for line in steps_of(folder / name)]


def steps_of(output: Path) -> list[dict[str, float]]:
    """What a training has logged of each step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def check_golden(file: str, found: dict[str, Curve], steps: int) -> None:
    """Holds curves to those of a file, by name; a file with one curve is for all of them.

    Tolerance: float32 sums in another order, amplified by Adam over the steps. A wrong gradient scale, a lost pair or
    another order of data is off by far more. Pillow before 13, which Python 3.10 has, draws other pixels: there curves
    of one file are held to the first of them, and others to nothing.
    """
    world = dist.get_world_size()
    first = next(iter(found.values()))
    path = FOLDER / file
    if os.environ.get("RERANKVPR_WRITE_GOLDEN") and world == 1:
        is_one = path.exists() and isinstance(json.loads(path.read_text()), list)
        path.write_text(json.dumps(first if is_one else found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    if isinstance(golden, list):
        golden = dict.fromkeys(found, golden if PILLOW >= 13 else first)
    elif PILLOW < 13:
        golden = found
    assert golden.keys() == found.keys()
    for name, values in found.items():
        assert len(values) == len(golden[name]) == steps
        for step, (one, expected) in enumerate(zip(values, golden[name], strict=True)):
            assert one == pytest.approx(expected, rel=2e-3), f"{name} at {world} ranks, step {step}"
