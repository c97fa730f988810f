"""Photographs on a machine whose memory is used up: never taken for damaged ones."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.decoders import decode_rgb
from data_pipeline.photos import read_photo

ROOT = Path(__file__).resolve().parent.parent

# What needs memory of its own is imported and warmed up before the limit is set.
CODE = """
import json, resource, sys, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from configs.reading import NO_THREAD, is_out_of_memory
from configs.schema import EvalConfig
from data_pipeline.images import decode_into, empty_batch, read_image
from data_pipeline.photos import read_photo
from eval.pixels import load_image
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards

one = ShardOptions(max_bad=1.0, threads=1)
small, large, source, small_source, out = map(Path, sys.argv[1:])
write_shards(read_gsv_cities(small_source, min_images_per_place=2), out.with_name("small_set"), one)
read_photo(small), read_image(small, 28), load_image(small, EvalConfig(resize="native"), 14)
data, buffer = large.read_bytes(), empty_batch(1, 28)[0]
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 60 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ends = {}
for name, run in {
    "shard": lambda: read_photo(large),
    "train": lambda: decode_into(buffer, data),
    "eval square": lambda: read_image(large, 28),
    "eval native": lambda: load_image(large, EvalConfig(resize="native"), 14),
    "write_shards": lambda: write_shards(read_gsv_cities(source, min_images_per_place=2), out, one),
}.items():
    try:
        ends[name] = str(run())
    except BaseException as error:
        traceback.print_exc()
        no_thread = str(error) == NO_THREAD and is_out_of_memory(error)  # there was no memory for its stack
        ends[name] = "MemoryError" if no_thread else type(error).__name__
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_a_photograph_that_memory_does_not_hold_is_not_damaged(tmp_path: Path) -> None:
    small, large = tmp_path / "small.jpg", tmp_path / "large.jpg"
    Image.new("RGB", (64, 48)).save(small)
    Image.new("RGB", (9000, 8000)).save(large)  # 216 MB as RGB
    sources = [write_place(tmp_path / "source", large), write_place(tmp_path / "small_source", small)]
    command = [sys.executable, "-c", CODE, *map(str, (small, large, *sources, tmp_path / "set"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1]).values()) == {"MemoryError"}, done.stdout + done.stderr
    assert not (tmp_path / "set" / "index.parquet").exists()


def test_a_header_that_claims_more_than_a_photograph_has_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its header claims 65000 x 65000 pixels; 268435456 at most"):
        decode_rgb(bomb(65_000, 65_000))
    (tmp_path / "bomb.jpg").write_bytes(bomb(65_000, 65_000))
    assert str(read_photo(tmp_path / "bomb.jpg")).startswith("its header claims 65000 x 65000 pixels")


def test_a_photograph_that_the_system_has_no_memory_to_open_is_not_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import photos

    def refuse(path: Path) -> bytes:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))

    monkeypatch.setattr(photos, "read_regular", refuse)
    with pytest.raises(MemoryError, match=r"a\.jpg: Cannot allocate memory"):
        photos.read_photo(tmp_path / "a.jpg")


def write_place(source: Path, photo: Path) -> Path:
    """GSV-Cities of one place, of which two photographs have the bytes of `photo`."""
    images = source / "Images" / "Oslo"
    images.mkdir(parents=True)
    rows = ["place_id,year,month,northdeg,city_id,lat,lon,panoid"]
    for i in range(2):
        (images / f"Oslo_0000001_2015_05_090_59.91_10.75_pano{i}.jpg").write_bytes(photo.read_bytes())
        rows.append(f"1,2015,5,90,Oslo,59.91,10.75,pano{i}")
    (source / "Dataframes").mkdir()
    (source / "Dataframes" / "Oslo.csv").write_text("\n".join(rows) + "\n")
    return source


def bomb(width: int, height: int) -> bytes:
    """A JPEG's bytes whose header claims a size."""
    import io

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)
