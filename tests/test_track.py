"""Positions by time: a track gives them to photographs and frames without GPS, between two of its points alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.photo_folder import read_photo_folder
from data_pipeline.sources.track import read_track, time_of_name
from launch.cli import main

EAST = """time;lat;lon
2024-05-01T10:30:00+02:00;48.0;9.0
2024-05-01T10:30:04;48.0;9.0004
2024-05-01T10:30:30;48.0;9.003
"""


@pytest.mark.parametrize(
    ("stem", "seconds"),
    [
        ("IMG_20240501_103000", 0.0),
        ("2024-05-01T10-30-00.250", 0.25),
        ("PXL_20240501_103001500", 1.5),
        ("walk 2024-05-01 10.30.59 (2)", 59.0),
        ("frame_000123", None),
        ("20241301_103000", None),
        ("120240501103000", None),
    ],
)
def test_names_hold_times(stem: str, seconds: float | None) -> None:
    start = time_of_name("20240501103000")
    assert start is not None
    found = time_of_name(stem)
    assert found == (None if seconds is None else pytest.approx(start + seconds))


def test_photographs_without_gps_lie_on_the_track(tmp_path: Path) -> None:
    (tmp_path / "walk.csv").write_text(EAST)
    names = ["IMG_20240501_103001.jpg", "IMG_20240501_103004.jpg", "IMG_20240501_103010.jpg", "plain.jpg"]
    for number, name in enumerate(names):
        Image.new("RGB", (9, 9), (40 * number, 0, 0)).save(tmp_path / name)
    found = read_photo_folder(tmp_path, track=read_track(tmp_path / "walk.csv"))
    assert found.names == names[:2]
    assert [fact.lon for fact in found.facts] == pytest.approx([9.0001, 9.0004])
    assert [fact.heading for fact in found.facts] == pytest.approx([90.0, 90.0])
    assert dict(found.left_out) == {
        names[2]: "no GPS, and the track has no points around its time",
        names[3]: "no GPS, and a time neither in EXIF nor in the name",
    }
    later = read_photo_folder(tmp_path, track=read_track(tmp_path / "walk.csv", offset_s=3))
    assert later.facts[0].lon == pytest.approx(9.0004)


def test_frames_of_a_video_become_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "frames").mkdir()
    rng = np.random.default_rng(0)
    for frame in range(0, 300, 10):
        image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        image.save(tmp_path / "frames" / f"walk_{frame:06d}.jpg")
    rows = [f"{second},{48 + 3e-5 * second},9.5" for second in range(11)]  # 3.3 m per second to the north
    (tmp_path / "walk.csv").write_text("\n".join(["time,lat,lon", *rows]))
    arguments = ["shard", "photos", str(tmp_path / "frames"), str(tmp_path / "set"), "--threads", "1"]
    assert main([*arguments, "--track", str(tmp_path / "walk.csv"), "--fps", "30", "--min-images-per-place", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nearest other photograph: 1.1 m in the median" in said
    places = re.search(r"set: (\d+) places, (\d+) images", said)
    assert places
    assert int(places[1]) >= 3
    with pytest.raises(SystemExit):
        main([*arguments, "--fps", "30"])
    assert "are for --track" in capsys.readouterr().err
