"""Tensors as a safetensors file: the same bytes each time, and readable as any other file is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.full_disk import FULL


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors to `file`, with the permissions that the umask gives a file or that it had before.

    safetensors itself writes a temporary file that its owner alone may read, and metadata in an order that changes from
    one process to the next. Raises OSError for a full disk, of which safetensors makes an error of its own.
    """
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file(dict(tensors), file, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        full = next((number for number in FULL if os.strerror(number) in str(error)), None)
        if full is None:
            raise
        raise OSError(full, os.strerror(full), str(file)) from error
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
