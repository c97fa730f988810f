"""Sharding photographs as phones and other programs write them: turned, in other formats, scaled."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipeline.decoders import decode_rgb
from data_pipeline.index import read_index
from data_pipeline.photos import Photo, read_photo
from data_pipeline.shard_options import ShardOptions
from launch.cli import main

JPEG_LOSS = 8.0  # of 255, colours at half the resolution; a picture turned otherwise differs by more than 40
FORMATS = ("phone.jpg", "a.png", "b.webp", "c.TIF", "d.bmp", "deep.png")


def _picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(FORMATS):
        picture = _picture(number)
        if name == "deep.png":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        picture.save(tmp_path / name, **({"exif": _turned()} if name == "phone.jpg" else {}))
    rows = "".join(f"{name},1\n" for name in FORMATS)
    (tmp_path / "mine.csv").write_text(f"path,place\n{rows}")
    return tmp_path


def _shard(folder: Path, out: str, *flags: str) -> int:
    return main(["shard", "manifest", str(folder / "mine.csv"), str(folder / out), *flags])


def _images(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    index = read_index(folder)
    rows = index.table.to_pylist()
    return [((folder / r["shard"]).read_bytes()[r["offset"] :][: r["size"]], r) for r in rows]


def test_other_formats_are_refused_by_suffix_and_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _shard(folder, "set")
    error = capsys.readouterr().err
    assert "5 of 6 photographs are no JPEGs (.png 2, .bmp 1, .tif 1, .webp 1); with --convert they are written" in error
    assert not (folder / "set").exists()


def test_converted_photographs_are_upright_jpegs_and_jpegs_keep_their_bytes(folder: Path) -> None:
    assert _shard(folder, "set", "--convert", "--quality", "100") == 0
    for (data, row), name in zip(_images(folder / "set"), FORMATS, strict=True):
        pixels = decode_rgb(data)
        assert (row["width"], row["height"]) == (pixels.shape[2], pixels.shape[1])
        if name == "phone.jpg":
            assert data == (folder / name).read_bytes()
            assert (row["width"], row["height"]) == (32, 48)
        else:
            expected = decode_rgb((folder / name).read_bytes())
            assert (pixels.float() - expected.float()).abs().mean() < JPEG_LOSS


def test_a_scaled_photograph_is_upright_without_a_tag(folder: Path) -> None:
    photo = read_photo(folder / "phone.jpg", ShardOptions(max_side=24, quality=100))
    assert isinstance(photo, Photo)
    written = Image.open(io.BytesIO(photo.jpeg))
    assert (photo.width, photo.height) == written.size == (16, 24)
    assert 0x0112 not in written.getexif()
    upright = ImageOps.exif_transpose(Image.open(folder / "phone.jpg")).resize((16, 24), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1).float()
    assert (decode_rgb(photo.jpeg).float() - expected).abs().mean() < JPEG_LOSS


def test_a_file_of_another_format_than_its_name_says_it(folder: Path) -> None:
    (folder / "a.png").rename(folder / "really.jpg")
    assert read_photo(folder / "really.jpg") == "not a JPEG but PNG; --convert writes it as one"
    (folder / "text.jpg").write_text("hello")
    assert read_photo(folder / "text.jpg") == "not a JPEG"
    assert str(read_photo(folder / "text.jpg", ShardOptions(convert=True))).startswith("not a photograph that can be")


def test_a_converted_set_is_another_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _shard(folder, "set", "--convert") == 0
    assert _shard(folder, "set", "--convert") == 0
    assert "used again" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _shard(folder, "set", "--convert", "--quality", "80")
    assert "holds another shard set" in capsys.readouterr().err
