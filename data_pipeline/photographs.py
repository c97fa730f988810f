"""The one door for photographs: what a folder holds of them, and what one shows.

Imports no torch, so that a folder is listed at once; `decode_rgb` imports its decoders.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.formats import HEIC_EXTRA, HEIC_SUFFIXES, SUFFIXES

if TYPE_CHECKING:
    import torch

# Thumbnails and rubbish of file managers, network disks and archives of a Mac; hidden ones are left out by their dot.
_OF_FILE_MANAGERS = frozenset(
    ("@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx")
)
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9_~#-]{1,10}")
_KINDS_SHOWN = 8


@dataclass(frozen=True)
class Listing:
    """The photographs of a folder, and how many files of it are none, by suffix or reason."""

    names: list[str]  # sorted, relative to the folder, with slashes
    left_out: Counter[str] = field(default_factory=Counter)

    def note(self) -> str:
        """`left out: .heic 3, .txt 1`, the largest first; empty if nothing was left out."""
        if not self.left_out:
            return ""
        hint = f" ({HEIC_EXTRA} reads .heic)" if HEIC_SUFFIXES & self.left_out.keys() else ""
        return f"left out: {counted(self.left_out)}{hint}"


def counted(kinds: Counter[str]) -> str:
    """`.heic 3, .txt 1`: the largest first, the smallest of many kinds together."""
    by_count = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    told = [f"{kind} {count}" for kind, count in by_count[:_KINDS_SHOWN]]
    if len(by_count) > _KINDS_SHOWN:
        told.append(f"other kinds {sum(count for _, count in by_count[_KINDS_SHOWN:])}")
    return ", ".join(told)


def list_photographs(folder: Path, *, deep: bool = True) -> Listing:
    """The photographs below a folder; every other file is counted, by its suffix or the reason.

    A photograph is a regular file with one of `SUFFIXES`, in any case. Hidden files and folders are left out, and those
    of file managers (`Thumbs.db`, `@eaDir`, `x.jpg~`); so is a folder that symbolic links reach a second time, which
    ends loops. Without `deep`, photographs in sub-folders are counted too. Raises OSError naming a folder that cannot
    be read (NotADirectoryError, PermissionError).
    """
    names: list[str] = []
    left_out: Counter[str] = Counter()
    seen = {_identity(folder.stat())}
    waiting = [("", folder)]
    while waiting:
        prefix, here = waiting.pop()
        with os.scandir(here) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        subfolders = []
        for entry in inside:
            name = f"{prefix}{entry.name}"
            if why := _left_out_by_name(entry.name):
                left_out[why] += 1
                continue
            try:
                if entry.is_dir():
                    if (identity := _identity(entry.stat())) in seen:
                        left_out["folders reached twice"] += 1
                    else:
                        seen.add(identity)
                        subfolders.append((f"{name}/", Path(entry.path)))
                    continue
                is_file = entry.is_file()
            except OSError:  # a link to itself
                is_file = False
            if not is_file:
                left_out["broken links" if entry.is_symlink() else "pipes, sockets and devices"] += 1
            elif (suffix := os.path.splitext(entry.name)[1].lower()) not in SUFFIXES:  # noqa: PTH122 - many names
                left_out[suffix if _PLAIN_SUFFIX.fullmatch(suffix) else "no suffix"] += 1
            elif prefix and not deep:
                left_out["in sub-folders"] += 1
            else:
                names.append(name)
        waiting += reversed(subfolders)
    return Listing(sorted(names), left_out)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _left_out_by_name(name: str) -> str:
    """Why a file or folder of this name is no photograph whatever it holds; empty if it may be one."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in _OF_FILE_MANAGERS:
        return "folders of file managers"
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that no table and no terminal holds
        return "names that are not UTF-8"
    return ""


def decode_rgb(data: bytes) -> torch.Tensor:
    """A photograph's bytes as uint8 [3, H, W], RGB; see `data_pipeline.decoders.decode_rgb`."""
    from data_pipeline.decoders import decode_rgb as decode

    return decode(data)
