"""EigenPlaces' places: photographs of a cell by the focal point that they look at."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import read_index
from data_pipeline.sources.cells import Grid, cell_sizes, place_of_images
from data_pipeline.sources.utm_folder import read_utm_folder
from data_pipeline.sources.viewpoints import NEITHER, looked_at
from launch.cli import main
from tests.photos import jpeg

HEADINGS = np.arange(0.0, 360.0, 30.0)


def street(east: float, north: float, angle: float, panoramas: int = 6, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Panoramas cut every 30 degrees, along a street that runs at `angle` degrees north of east, 1 m wide."""
    rng = np.random.default_rng(seed)
    along, across = rng.uniform(-6, 6, panoramas), rng.uniform(-0.5, 0.5, panoramas)
    turn = np.radians(angle)
    e = east + along * np.cos(turn) - across * np.sin(turn)
    n = north + along * np.sin(turn) + across * np.cos(turn)
    return np.repeat(e, 12), np.repeat(n, 12), np.tile(HEADINGS, panoramas)


def expected_sides(e: np.ndarray, n: np.ndarray, heading: np.ndarray, focal_m: float, view_deg: float) -> np.ndarray:
    """One cell by the definition, image by image, with numpy's SVD; the signs are those that more images look."""
    points = np.stack([e, n], axis=1)
    mean = points.mean(axis=0)
    directions = np.linalg.svd(points - mean, full_matrices=False)[2]  # rows: along, across
    off = []
    for direction in directions[::-1]:
        ways = []
        for sign in (1, -1):
            to = mean + sign * focal_m * direction - points
            bearing = np.degrees(np.arctan2(to[:, 0], to[:, 1]))
            ways.append(np.abs((heading - bearing + 180) % 360 - 180))
        ways.sort(key=lambda way: -(way <= view_deg / 2).sum())
        off.append(ways[0])
    side = np.argmin(off, axis=0)
    return np.where(np.min(off, axis=0) <= view_deg / 2, side, NEITHER)


@pytest.mark.parametrize("angle", [10.0, 65.0, -40.0])
def test_sides_are_those_of_the_definition(angle: float) -> None:
    e, n, heading = street(500_007.5, 5_316_007.5, angle, panoramas=7, seed=3)
    heading = heading + 7.0
    side = looked_at(e, n, heading, np.zeros(len(e), np.int64), focal_m=10, view_deg=60)
    # Of an axis that as many look at each way along, either sign would do: then the images differ, their number not.
    expected = expected_sides(e, n, heading, 10, 60)
    assert [(side == s).sum() for s in (0, 1)] == [(expected == s).sum() for s in (0, 1)]
    across, along = heading[side == 0], heading[side == 1]
    way = np.degrees(np.arctan2(np.cos(np.radians(angle)), np.sin(np.radians(angle))))  # bearing of the street
    assert np.cos(np.radians(2 * (along - way))).mean() > 0.5  # mostly along the street, one way or the other
    assert np.cos(np.radians(2 * (across - way))).mean() < -0.5
    assert (np.abs(np.sin(np.radians(across - across[0]) / 2)) < 0.8).all()  # all to one side


def test_each_cell_is_looked_at_by_itself() -> None:
    parts = [street(500_007.5 + 15 * k, 5_316_007.5, angle, seed=k) for k, angle in enumerate((0.0, 90.0, 30.0))]
    e, n, heading = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    cell = np.repeat(np.arange(3), len(parts[0][0]))
    together = looked_at(e, n, heading, cell, focal_m=10, view_deg=60)
    alone = [looked_at(*part, np.zeros(len(part[0]), np.int64), focal_m=10, view_deg=60) for part in parts]
    assert np.array_equal(together, np.concatenate(alone))
    assert set(together.tolist()) == {0, 1, NEITHER}


def test_what_has_no_direction_or_heading_is_of_neither() -> None:
    e, n, heading = street(500_007.5, 5_316_007.5, 0.0)
    spot = np.full(len(e), 500_007.5)
    assert (looked_at(spot, spot, heading, np.zeros(len(e), np.int64), focal_m=10, view_deg=60) == NEITHER).all()
    some = np.where(np.arange(len(e)) % 2, np.nan, heading)
    side = looked_at(e, n, some, np.zeros(len(e), np.int64), focal_m=10, view_deg=60)
    assert (side[np.isnan(some)] == NEITHER).all()
    assert (side != NEITHER).any()
    with pytest.raises(ValueError, match="--focal-m 10 needs headings, and none of 72 photographs has one"):
        looked_at(e, n, np.full(len(e), np.nan), np.zeros(len(e), np.int64), focal_m=10, view_deg=60)


def test_sides_are_groups_and_places_of_a_group_do_not_touch() -> None:
    rng = np.random.default_rng(0)
    e, n = np.repeat(rng.uniform(0, 150, 400), 12), np.repeat(rng.uniform(0, 150, 400), 12)
    heading = np.tile(HEADINGS, 400)
    grid = Grid(cell_m=15, heading_deg=60, groups=3, focal_m=10)
    suffix, place = place_of_images(e, n, heading, grid)
    cells: dict[tuple[str, int], set[tuple[float, float]]] = {}
    for image in np.flatnonzero(place != NEITHER):
        cells.setdefault((suffix[image], int(place[image])), set()).add((e[image] // 15, n[image] // 15))
    assert all(len(spots) == 1 for spots in cells.values())
    groups = {group for group, _ in cells}
    assert {group.rpartition("-")[2] for group in groups} == {"lateral", "frontal"}
    for group in groups:
        assert sorted(p for g, p in cells if g == group) == list(range(sum(g == group for g, _ in cells)))
        spots = [next(iter(spot)) for (g, _), spot in cells.items() if g == group]
        for one in spots:
            assert all(max(abs(one[0] - o[0]), abs(one[1] - o[1])) >= 3 for o in spots if o != one)
    sizes = cell_sizes(e, n, heading, grid, 4)
    counts = np.unique([f"{s} {p}" for s, p in zip(suffix, place, strict=True) if p != NEITHER], return_counts=True)[1]
    assert next(size for size in sizes if size.cell_m == 15).images == counts[counts >= 4].sum()
    with pytest.raises(ValueError, match="focal points -1 m away"):
        Grid(focal_m=-1)


def test_nobody_looks_at_a_focal_point() -> None:
    e, n, _ = street(500_007.5, 5_316_007.5, 0.0)
    suffix, place = place_of_images(e, n, np.where(e > 0, 45.0, 0.0), Grid(15, 10, 1, 500.0))
    assert (place == NEITHER).all()
    assert set(suffix) == {""}


def test_a_utm_folder_is_sharded_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    folder = tmp_path / "town"
    folder.mkdir()
    e, n, heading = street(500_007.5, 5_316_007.5, 20.0)
    for number, (east, north, north_deg) in enumerate(zip(e, n, heading, strict=True)):
        name = f"@{east:.2f}@{north:.2f}@32@U@48.1@11.5@pano{number}@@{north_deg:.0f}@@@@20190714@@.jpg"
        (folder / name).write_bytes(jpeg(rng))
    argv = ["shard", "utm", str(folder), str(tmp_path / "set"), "--cell-m", "15", "--heading-deg", "60"]
    assert main([*argv, "--groups", "1", "--focal-m", "10", "--min-images-per-place", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    lost = int(re.findall(r"left out: (\d+) of 72 photographs that belong to no place", said)[0])
    index = read_index(tmp_path / "set")
    assert {city.removeprefix("town-") for city in index.cities} == {"lateral", "frontal"}
    listing = read_utm_folder(folder, grid=Grid(15, 60, 1, 10), min_images_per_place=1)
    assert listing.num_images == 72 - lost
    assert index.num_images <= listing.num_images


def test_a_table_of_places_has_no_focal_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "place"), ("a.jpg", 1), ("b.jpg", 2)])
    argv = ["shard", "manifest", str(tmp_path / "mine.csv"), str(tmp_path / "set"), "--focal-m", "10"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "--focal-m makes places of positions, but the table has a column place" in capsys.readouterr().err
