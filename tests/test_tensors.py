"""Safetensors files as the project writes them: permissions and bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from configs.files import replacing
from configs.tensors import save_tensors

TENSORS = {"b": torch.arange(3), "a": torch.ones(2, 2)}
METADATA = {"recipe": 'name: "ü" \t\n\x1f\x7f\u2028', "key": "1", "digest": "\\", "": ""}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read_it(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors(TENSORS, tmp_path / "net.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "net.safetensors").stat().st_mode) == 0o666 & ~mask


def test_the_order_of_metadata_does_not_change_the_bytes(tmp_path: Path) -> None:
    found = set()
    for number in range(20):
        file = tmp_path / f"{number}.safetensors"
        items = list(METADATA.items())
        save_tensors(TENSORS, file, dict(items[number % 4 :] + items[: number % 4]))
        found.add(file.read_bytes())
    assert len(found) == 1
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == METADATA
        assert {name: opened.get_tensor(name).tolist() for name in opened.keys()} == {  # noqa: SIM118 - no mapping
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }


def test_a_full_disk_is_the_systems_error_and_names_the_file(tiny_disk: Path) -> None:
    file = tiny_disk / "net.safetensors"
    with pytest.raises(OSError, match="No space left on device") as caught, replacing(file) as partial:
        save_tensors({"a": torch.zeros(10**6)}, partial)
    assert caught.value.filename == str(file)
    assert list(tiny_disk.iterdir()) == []
