"""Benchmark adapters: folders, positives, protocols and what is said of a wrong name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks.layouts import utm_folder
from eval.benchmarks.load import load_benchmarks
from eval.benchmarks.sequences import GARDENS_TRAVERSES


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def gardens(tmp_path: Path) -> Path:
    for traverse in GARDENS_TRAVERSES:
        for frame in range(200):
            _touch(tmp_path / "gardens_point" / traverse / f"Image{frame:03d}.jpg")
    return tmp_path


def test_utm_folder_takes_the_radius_with_its_border(tmp_path: Path) -> None:
    points = {"database": [(0, 0), (25, 0), (25.1, 0), (15, 20)], "queries": [(0, 0), (500, 500)]}
    for part, places in points.items():
        for i, (east, north) in enumerate(places):
            _touch(tmp_path / "images/test" / part / f"@{548000 + east:.1f}@{4180000 + north:.1f}@10@S@@@{i}@.jpg")
    benchmark = utm_folder("town", tmp_path)
    near = {benchmark.database[i].name.split("@")[-2] for i in benchmark.positives(0)}
    assert near == {"0", "1", "3"}
    assert len(benchmark.positives(1)) == 0
    assert benchmark.positive_offsets.dtype == benchmark.positive_ids.dtype == np.int64
    assert "25 m" in benchmark.protocol


def test_utm_name_without_position_is_named(tmp_path: Path) -> None:
    for part in ("database", "queries"):
        _touch(tmp_path / "images/test" / part / "photo.jpg")
    with pytest.raises(ValueError, match=r"photo\.jpg.*@UTM_east@UTM_north@"):
        utm_folder("town", tmp_path)


def test_gardens_point_alone_is_three_pairs(gardens: Path) -> None:
    benchmarks = load_benchmarks(["gardens_point"], gardens)
    pairs = [(b.database[0].parent.name, b.queries[0].parent.name) for b in benchmarks]
    assert pairs == [("day_right", "night_right"), ("day_left", "night_right"), ("day_right", "day_left")]
    assert all(len(b.database) == len(b.queries) == 200 for b in benchmarks)
    counts = np.diff(benchmarks[0].positive_offsets)
    assert counts.mean() == pytest.approx(4.97)  # five each, three and four at both ends
    assert benchmarks[0].positives(0).tolist() == [0, 1, 2]
    assert benchmarks[0].positives(199).tolist() == [197, 198, 199]


def test_frame_range_cuts_database_and_queries(gardens: Path) -> None:
    (benchmark,) = load_benchmarks(["gardens_point/day_right/day_left/100-199"], gardens)
    assert benchmark.database[0].name == benchmark.queries[0].name == "Image100.jpg"
    assert len(benchmark.database) == len(benchmark.queries) == 100
    assert benchmark.positives(0).tolist() == [0, 1, 2]
    assert benchmark.positives(50).tolist() == [48, 49, 50, 51, 52]
    assert "+-2" in benchmark.protocol
    assert "100-199" in benchmark.protocol
    assert len(load_benchmarks(["gardens_point/7-7"], gardens)) == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gardns_point", "nearest: gardens_point"),
        ("gardens_point/day_rigt/night_right", "nearest: day_right"),
        ("gardens_point/day_right", r"\[/DATABASE/QUERY\]"),
        ("gardens_point/150-200", "150-200"),
        ("gardens_point/20-10", "20-10"),
        ("town/x", "no options"),
    ],
)
def test_wrong_specs_are_answered_in_one_line(gardens: Path, spec: str, said: str) -> None:
    (gardens / "town").mkdir()
    with pytest.raises(ValueError, match=said) as caught:
        load_benchmarks([spec], gardens)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_short_traverse_are_named(gardens: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="town"):
        load_benchmarks(["town"], tmp_path)
    (gardens / "gardens_point/day_left/Image017.jpg").unlink()
    with pytest.raises(ValueError, match=r"day_left.*199"):
        load_benchmarks(["gardens_point"], gardens)


def test_gardens_point_all_is_six_pairs(gardens: Path) -> None:
    names = [b.name for b in load_benchmarks(["gardens_point/all/100-199"], gardens)]
    assert len(names) == len(set(names)) == 6
    assert all(name.endswith("/100-199") for name in names)
