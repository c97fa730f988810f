"""The folder of a training's checkpoints: which are whole, which is the newest and which the best.

`step-<n>/` is a checkpoint if its manifest, written last, names the size and digest of each of its files. `latest` and
`best` are one-line files replaced by rename.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from configs.files import file_sha256, write_whole

MANIFEST = "manifest.json"
FORMAT = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says which and why."""


def step_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def point(link: Path, checkpoint: Path, recall: float | None = None) -> None:
    """Makes the one-line file `link` name `checkpoint` (and the recall it is kept for), atomically."""
    write_whole(link, checkpoint.name + ("\n" if recall is None else f" {recall}\n"))


def pointed(link: Path) -> Path | None:
    """The checkpoint that a `latest` or `best` file names."""
    return link.parent / link.read_text().split()[0] if link.is_file() else None


def best_recall(folder: Path) -> float:
    """The recall that `best` is kept for; -1 where there is none yet."""
    link = folder / "best"
    return float(link.read_text().split()[1]) if link.is_file() else -1.0


def faults(checkpoint: Path) -> list[str]:
    """What differs between a checkpoint and its manifest; empty if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return [f"{checkpoint} has no {MANIFEST}: it is no checkpoint, or was cut off while it was written"]
    except ValueError:
        return [f"{checkpoint / MANIFEST} is not valid JSON"]
    if manifest.get("format") != FORMAT:
        return [f"{checkpoint} has format {manifest.get('format')}; this version reads {FORMAT}"]
    found = []
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            found.append(f"{file} has {file.stat().st_size} bytes, expected {expected['bytes']}")
        elif file_sha256(file) != expected["sha256"]:
            found.append(f"{file} differs from its digest")
    return found


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, what a `latest` or `best` file names, or a run's best, else newest.

    Raises CheckpointError if there is none or it is damaged.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    target = pointed(path) or pointed(folder / "best") or pointed(folder / "latest") or folder
    damage = faults(target)
    if damage:
        raise CheckpointError(damage[0])
    return target


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and what was wrong with the newer ones."""
    notes: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        damage = faults(candidate)
        if not damage:
            return candidate, notes
        notes.append(damage[0])
    return None, notes


def set_aside_newer(folder: Path, checkpoint: Path | None) -> None:
    """Renames to `unused-step-...` the checkpoints newer than the one gone on from: damaged, or left behind."""
    for newer in sorted(folder.glob("step-*")):
        if checkpoint is None or newer.name > checkpoint.name:
            shutil.rmtree(folder / f"unused-{newer.name}", ignore_errors=True)
            newer.rename(folder / f"unused-{newer.name}")
            if pointed(folder / "best") == newer:
                (folder / "best").unlink()
    if checkpoint is not None and checkpoint.parent == folder:
        point(folder / "latest", checkpoint)


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints and the best one, and left-over partial ones."""
    kept = {*sorted(folder.glob("step-*"))[-keep_last:], pointed(folder / "best")}
    for old in {*folder.glob("step-*"), *folder.glob(".step-*.partial")} - kept:
        shutil.rmtree(old)
