"""Tensors as a safetensors file: the same bytes each time, and readable as any other file is."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors to `file`, with the permissions that the umask gives a file or that it had before.

    safetensors itself writes a temporary file that its owner alone may read, and metadata in an order that changes from
    one process to the next.
    """
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata=None if metadata is None else dict(metadata))
    file.chmod(mode)
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Sorts the metadata in the header, which keeps its length."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise ValueError(f"{file}: a header of {length} bytes became one of {len(text)}")
        opened.seek(8)
        opened.write(text)
