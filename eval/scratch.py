"""Folders that all ranks must see as one, on however many nodes they run."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from configs.ranks import from_rank_0

SEEN_WITHIN_S = 5.0  # a network file system may show a new file that late
PREFIX = ".features-"


def is_seen(path: Path, within_s: float = SEEN_WITHIN_S) -> bool:
    """Whether a file or folder that another host has made is there, asked again for `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        if path.parent.is_dir():
            list(path.parent.iterdir())  # a network file system looks again
        time.sleep(0.1)
    return True


def hosts_that_miss(path: Path, within_s: float = SEEN_WITHIN_S) -> list[str]:
    """`rank r on HOST` for each rank that does not see a path of rank 0's; equal on every rank, which all call this."""
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, "" if is_seen(path, within_s) else f"rank {dist.get_rank()} on {platform.node()}")
    return [one for one in said if one]


def common_temporary_folder(beside: Path | None) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """A new folder that every rank sees, and on rank 0 what removes it; every rank calls this.

    It lies in the system's temporary folder, or, if ranks have not one of those in common, in `beside`. Raises
    ValueError on every rank if `beside` is None then, or is not seen by all.
    """
    folder, owner = _made_by_rank_0(None)
    missing = hosts_that_miss(folder, within_s=0.0)
    if not missing:
        return folder, owner
    if owner:
        owner.cleanup()
    if beside is None:
        raise ValueError(
            f"{missing[0]} does not see rank 0's temporary folder {folder}: on several nodes features need a folder "
            "that all of them see; name one with --features, or an output with --out"
        )
    folder, owner = _made_by_rank_0(beside)
    if missing := hosts_that_miss(folder):
        raise ValueError(f"{missing[0]} does not see rank 0's {beside}; use a folder that all nodes mount")
    return folder, owner


def remove_leftovers(beside: Path) -> None:
    """Removes the temporary folders that killed processes have left in `beside`, whose only user this process is."""
    for folder in beside.glob(f"{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _made_by_rank_0(beside: Path | None) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    owner: list[tempfile.TemporaryDirectory[str]] = []

    def make() -> Path:
        if beside:
            beside.mkdir(parents=True, exist_ok=True)
        owner.append(tempfile.TemporaryDirectory(prefix=PREFIX, dir=beside, ignore_cleanup_errors=True))
        return Path(owner[0].name).absolute()

    folder = from_rank_0(make)
    return folder, owner[0] if owner else None
