"""A folder of phone photographs: what EXIF says, what is left out with why, which cells, and a shard set of it."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from data_pipeline.exif import CameraFacts, read_exif
from data_pipeline.index import read_index
from data_pipeline.positions import from_lat_lon
from data_pipeline.sources.cells import CellSize, Grid, place_of_images, plane, suggested
from data_pipeline.sources.photo_folder import read_photo_folder
from data_pipeline.town.phone import Odd, Walk, photograph_town
from data_pipeline.verify import verify_shards
from launch.cli import main
from tests.phones import at, photograph

WALK = Walk(places=6, views=5, error_m=1.0, odd=Odd(webp=3, without_gps=2, copies=1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_position_is_read_in_every_hemisphere_and_format(tmp_path: Path, suffix: str) -> None:
    gps = {1: "S", 2: (33.0, 51.0, 36.0), 3: "W", 4: (70.0, 30.0, 0.0), 17: 370.0, 31: 4.5}
    found = read_exif(photograph(tmp_path / f"a.{suffix}", gps, taken="2024:05:01 10:30:59"))
    assert (found.lat, found.lon) == (pytest.approx(-33.86), pytest.approx(-70.5))
    assert (found.heading, found.error_m, found.fault) == (10.0, 4.5, "")
    assert found.taken is not None
    assert found.taken.isoformat() == "2024-05-01T10:30:59"


@pytest.mark.parametrize(
    ("gps", "fault"),
    [
        (None, "no GPS"),
        ({}, "no GPS"),
        (at(48, 9) | {1: ""}, "GPS without its hemisphere"),
        (at(0, 0), "GPS 0, 0: a receiver without a fix"),
        (at(91, 9), "GPS beyond 90 degrees"),
        (at(48, 9) | {4: IFDRational(1, 0)}, "GPS that is no number"),
    ],
)
def test_a_photograph_without_a_position_says_why(tmp_path: Path, gps: dict[int, Any] | None, fault: str) -> None:
    assert read_exif(photograph(tmp_path / "a.jpg", gps)) == CameraFacts(fault=fault)


def test_damaged_exif_is_no_position(tmp_path: Path) -> None:
    data = photograph(tmp_path / "a.jpg", at(48, 9)).read_bytes()
    rng = np.random.default_rng(0)
    start = data.index(b"Exif") + 6
    for number in range(40):
        damaged = bytearray(data)
        for byte in rng.integers(start, start + 150, 12).tolist():
            damaged[byte] = int(rng.integers(256))
        (tmp_path / "b.jpg").write_bytes(damaged)
        with contextlib.suppress(ValueError):  # which names the file
            found = read_exif(tmp_path / "b.jpg")
            assert found.fault or (abs(found.lat or 0) <= 90 and abs(found.lon or 0) <= 180), number


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A walk through the town with EXIF turned, WebP, PNG of 16 bits, 12 megapixels, copies and no GPS."""
    folder = tmp_path_factory.mktemp("phone") / "my walk"
    photograph_town(folder, WALK)
    return folder


def test_every_photograph_is_used_or_named_with_why(phone: Path) -> None:
    found = read_photo_folder(phone)
    assert Counter(why for _, why in found.left_out) == {"no GPS": 2, "the same bytes as another": 1}
    assert all("(1)" in name for name, why in found.left_out if "bytes" in why)
    assert len(found.names) == 28
    assert {Path(name).suffix for name in found.names} == {".jpg", ".JPG", ".webp", ".PNG"}
    assert found.note == "left out: .txt 1"
    assert all(fact.heading is not None and fact.taken for fact in found.facts)


def test_a_folder_is_sharded_with_all_its_formats_upright(
    phone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    arguments = ["shard", "photos", str(phone), str(out), "--min-images-per-place", "2", "--threads", "1"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--convert" in capsys.readouterr().err
    assert main([*arguments, "--convert", "--max-side", "400", "--cell-m", "20"]) == 0
    printed = capsys.readouterr().out
    for words in ("nearest other photograph", "20 *", "3 photographs (no GPS 2, the same bytes as another 1)"):
        assert words in printed
    left_out = (out / "left_out.csv").read_text().splitlines()
    assert (left_out[0], len(left_out)) == ("path,why", 4)
    assert verify_shards(out) == []
    rows = read_index(out).table.to_pylist()
    assert {row["city"] for row in rows} == {"my-walk"}
    assert len(rows) >= 20
    assert {(row["year"], row["width"] > row["height"]) for row in rows} == {(2026, True)}  # turned ones as well
    row = rows[0]
    with (out / row["shard"]).open("rb") as tar:
        tar.seek(row["offset"])
        assert Image.open(io.BytesIO(tar.read(row["size"]))).format == "JPEG"


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([None] * 4, "none of 4 photographs says where it was taken (no GPS 4)"),
        ([(48.0, 9.0)] * 8, "all 8 photographs show one place (they lie within 0 m); training needs two"),
        ([(48.0, 9.0), (48.1, 9.0)], "none of 2 places has 4 images (the largest has 1); lower min_images_per_place"),
        ([(48.0, 9.0 + 1.3e-4 * n) for n in range(12)], "none of 11 places has 4 images .* or use --cell-m"),
    ],
)
def test_a_folder_that_gives_no_places_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], positions: list[tuple[float, float] | None], said: str
) -> None:
    for number, position in enumerate(positions):
        photograph(tmp_path / f"{number}.jpg", at(*position) if position else None, shade=number)
    _refused(["shard", "photos", str(tmp_path), str(tmp_path / "out")], said, capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_photographs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    _refused(["shard", "photos", str(tmp_path / "nowhere"), out], "nowhere: no such folder", capsys)
    (tmp_path / "a.txt").write_text("text")
    _refused(["shard", "photos", str(tmp_path), out], "no photographs in it (left out: .txt 1)", capsys)
    (tmp_path / "b.jpg").write_text("text")
    _refused(["shard", "photos", str(tmp_path), out], "(not a photograph 1)", capsys)
    if os.geteuid():  # nothing is closed to root
        tmp_path.chmod(0)
        _refused(["shard", "photos", str(tmp_path), out], "Permission denied", capsys)
        tmp_path.chmod(0o700)


def _refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert re.search(said if ".*" in said else re.escape(said), printed), printed
    assert len(printed.splitlines()) == 1


# Cells


def test_a_town_on_a_border_of_zones_stays_whole() -> None:
    rng = np.random.default_rng(0)
    lat, lon = 48 + rng.uniform(-1e-4, 1e-4, 40), 12 + rng.uniform(-2e-3, 2e-3, 40)  # zones 32 and 33
    positions = from_lat_lon(lat, lon, "t")
    assert set(positions.zone.tolist()) == {32, 33}
    east, north, suffix = plane(positions)
    assert set(suffix) == {""}
    assert np.ptp(east) == pytest.approx(np.ptp(lon) * 74_700, rel=0.01)
    assert len(set(place_of_images(east, north, np.full(40, np.nan), Grid(cell_m=1000, groups=1))[1])) <= 4
    _, _, far = plane(from_lat_lon(np.array([48.0, 48.0]), np.array([9.0, 100.0]), "t"))
    assert far == ["-32", "-47"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 100)), min_size=1, max_size=6))
def test_the_suggestion_is_of_those_that_give_two_places(drawn: list[tuple[int, int]]) -> None:
    sizes = [CellSize(5.0 * (n + 1), places, images, 0.0) for n, (places, images) in enumerate(drawn)]
    found = suggested(sizes)
    useful = {size.cell_m: size for size in sizes if size.places >= 2}
    assert (found is None) == (not useful)
    if found is not None:
        most = max(size.images for size in useful.values())
        assert found == min(size.cell_m for size in useful.values() if size.images >= 0.85 * most)
