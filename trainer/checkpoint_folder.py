"""The folder of a training's checkpoints: which are whole, which is the newest and which the best.

`step-<n>/` is a checkpoint if its manifest, written last, names the size and digest of each of its files. `latest` and
`best` are one-line files replaced by rename.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

from configs.files import write_whole
from configs.reading import reading, shown
from trainer.manifest import MANIFEST, CheckpointError, faults

_STEP = re.compile(r"step-\d{8,18}", re.ASCII)
LINKS = ("latest", "best")


def step_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def point(link: Path, checkpoint: Path, recall: float | None = None) -> None:
    """Makes the one-line file `link` name `checkpoint` (and the recall it is kept for), atomically."""
    write_whole(link, checkpoint.name + ("\n" if recall is None else f" {recall}\n"))


def pointed(link: Path) -> Path | None:
    """The checkpoint that a `latest` or `best` file names; None where there is no such file.

    Raises CheckpointError where it names none.
    """
    words = _words(link)
    return link.parent / words[0] if words else None


def best_recall(folder: Path) -> float:
    """The recall that `best` is kept for; -1 where there is none yet. Raises CheckpointError where it is damaged."""
    words = _words(folder / "best")
    return float(words[1]) if len(words) > 1 else -1.0


def _words(link: Path) -> list[str]:
    if not link.is_file():
        return []
    with reading(link, "the name of a checkpoint", CheckpointError):
        words = link.read_text(encoding="utf-8")[:1000].split()
        if not words or not _STEP.fullmatch(words[0]) or (len(words) > 1 and not math.isfinite(float(words[1]))):
            raise ValueError(f"it says {shown(' '.join(words))!r}")
        return words


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, whole or not; a file, or a folder of another name, is none."""
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())


def drop_lost_best(folder: Path) -> str:
    """Removes a `best` that names no checkpoint, or one that is gone, and returns a line on it; empty if all is well.

    The next validation makes another.
    """
    link = folder / "best"
    try:
        best = pointed(link)
        best_recall(folder)
    except CheckpointError as error:
        why = str(error)
    else:
        if best is None or best.is_dir():
            return ""
        why = f"{link} names {best.name}, which is gone"
    link.unlink()
    return f"{why}; it is removed, the next validation makes another"


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, what a `latest` or `best` file names, or a run's best, else newest.

    Raises CheckpointError if there is none or it is damaged.
    """
    if path.is_file() and path.name not in LINKS:
        raise CheckpointError(_what_file(path))
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    target = pointed(path) or pointed(folder / "best") or pointed(folder / "latest") or folder
    if target.parent == folder and not target.is_dir():
        there = ", ".join(step.name for step in step_folders(folder)) or "no checkpoint"
        raise CheckpointError(f"{target} is gone, which best or latest names; {folder} holds {there}: name one of them")
    damage = faults(target)
    if damage:
        raise CheckpointError(damage[0])
    return target


def _what_file(path: Path) -> str:
    """What is wrong with a file that is given for a checkpoint."""
    if (path.parent / MANIFEST).is_file():
        return f"{path} is one file of a checkpoint; give its folder, {path.parent}"
    return (
        f"{path} is a file; a checkpoint is a folder of a training's output, such as runs/demo. A backbone's weights "
        "(.pth, .safetensors) are read by model.weights and eval --weights; a checkpoint of Lightning is not read"
    )


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and what was wrong with the newer ones."""
    notes: list[str] = []
    for candidate in reversed(step_folders(folder)):
        damage = faults(candidate)
        if not damage:
            return candidate, notes
        notes.append(damage[0])
    return None, notes


def set_aside_newer(folder: Path, checkpoint: Path | None) -> None:
    """Renames to `unused-step-...` the checkpoints newer than the one gone on from: damaged, or left behind."""
    for newer in step_folders(folder):
        if checkpoint is None or newer.name > checkpoint.name:
            shutil.rmtree(folder / f"unused-{newer.name}", ignore_errors=True)
            newer.rename(folder / f"unused-{newer.name}")
            if pointed(folder / "best") == newer:
                (folder / "best").unlink()
    if checkpoint is not None and checkpoint.parent == folder:
        point(folder / "latest", checkpoint)


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints and the best one, and left-over partial ones."""
    kept = {*step_folders(folder)[-keep_last:], pointed(folder / "best")}
    for old in {*step_folders(folder), *folder.glob(".step-*.partial")} - kept:
        shutil.rmtree(old)
