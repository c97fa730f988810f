"""`python -m tests.checkpoint_crashes FOLDER`: a writer of checkpoints killed at each of its write points in turn.

A write point is each time that Python opens a file for writing, makes, renames or removes something in the folder
(CPython's audit events), and the middle of each file of tensors. Each is met in a process forked for it. Prints a JSON
line a crash: the point, and the checkpoint that a resume would take afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import checkpoint_writer
from trainer.checkpoint import Contents
from trainer.checkpoint_folder import newest_valid

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def contents(step: int) -> Contents:
    """A small checkpoint whose every value tells its step."""
    return {
        "model-00000-of-00001.safetensors": {"w": torch.full((50, 30), float(step))},
        "optimizer-00000-of-00001.safetensors": {"w:exp_avg": torch.full((50, 30), -float(step))},
        "random-00000-of-00001.safetensors": {"cpu": torch.zeros(8)},
        "queue-00000-of-00001.safetensors": {"steps": torch.full((4,), step)},
        "optimizer.json": "{}",
        "recipe.yaml": "{}",
        "state.json": json.dumps({"step": step}),
    }


def write(folder: Path, step: int) -> None:
    """Writes the checkpoint of a step in a process group of one, keeping no other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    writer = checkpoint_writer.CheckpointWriter(folder, keep_last=1, say=print)
    writer.begin(step, contents(step))
    if not writer.finish():
        os._exit(1)


def die_at(folder: Path, point: int) -> None:
    """Lets this process be killed at its write point `point`, counted from 0."""
    seen = 0

    def count(what: str) -> None:
        nonlocal seen
        if seen == point:
            (folder.parent / "point.txt").write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def hook(event: str, args: tuple[Any, ...]) -> None:
        inside = event == "os.remove" and args[1] != -1  # rmtree names a file by its folder's descriptor
        if event not in EVENTS or not (inside or str(args[0]).startswith(str(folder))):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        count(f"{event} {Path(str(args[0])).name}")

    def half(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save(tensors, file)
        size = file.stat().st_size
        if seen == point:
            os.truncate(file, size // 2)
        count(f"half of {file.name}")

    save = checkpoint_writer.save_tensors
    checkpoint_writer.save_tensors = half
    sys.addaudithook(hook)


def main() -> None:
    """All write points, over an older checkpoint and over a damaged one of the same step."""
    torch.set_num_threads(1)
    place = Path(sys.argv[1]).resolve()
    template, folder = place / "template", place / "checkpoints"
    in_child(lambda: write(template, 2))
    for damaged in (False, True):
        if damaged:
            shutil.copytree(template / "step-00000002", template / "step-00000004")
            (template / "step-00000004" / "state.json").write_text("{")
        point, died = 0, True
        while died:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(template, folder)

            def crash(point: int = point) -> None:
                die_at(folder, point)
                write(folder, 4)

            died = in_child(crash)
            found, _ = newest_valid(folder)
            step = json.loads((found / "state.json").read_text())["step"] if found else None
            at = (place / "point.txt").read_text() if died else "none"
            print(json.dumps({"damaged": damaged, "point": at, "found": step, "died": died}), flush=True)
            point += 1


def in_child(run: Any) -> bool:
    """Runs something in a forked process; True if it was killed, False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, f"the child ended with {os.WEXITSTATUS(status)}"
    return False


if __name__ == "__main__":
    main()
