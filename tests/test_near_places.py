"""Places that are too near to be negatives: distances, coordinates of an index, and what is refused without them."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import LossConfig, MemoryConfig
from data_pipeline.index import read_index, read_table, write_index
from data_pipeline.place_positions import place_points, points_for, share_with_neighbours
from data_pipeline.utm import on_ellipsoid
from memory.global_loss import GlobalLoss
from memory.near_places import NearPlaces
from memory.queue import MemoryQueue


def near_of(points: np.ndarray, metres: float, anchors: torch.Tensor, columns: torch.Tensor) -> np.ndarray:
    near = NearPlaces(torch.from_numpy(points), metres)
    buffer = torch.empty(len(anchors), len(columns) + 1, dtype=torch.float64)
    found = near.rows(anchors, near.columns(columns), buffer)
    assert not found[:, -1].any()
    return found[:, :-1].numpy()


@settings(max_examples=60)
@given(st.integers(0, 1 << 16), st.sampled_from([0.5, 5.0, 25.0, 1000.0, 3e6]))
def test_pairs_are_near_or_not_as_float64_says(seed: int, metres: float) -> None:
    """Around the globe, poles too: only pairs within 0.22 m of the border may fall on the other side of it."""
    rng = np.random.default_rng(seed)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 40))), rng.uniform(-180, 180, 40)
    spread = metres / 111_000
    lat = np.clip(np.concatenate([lat, lat + rng.uniform(-spread, spread, 40)]), -90, 90)
    lon = np.concatenate([lon, lon + rng.uniform(-spread, spread, 40)])
    points = on_ellipsoid(lat, lon)
    every = torch.arange(80)
    found = near_of(points, metres, every, every)
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    assert found[apart < metres - 0.22].all()
    assert not found[apart > metres + 0.22].any()
    assert found.diagonal().all()
    assert np.array_equal(found, found.T)


def test_the_border_itself_is_not_near_in_any_tile() -> None:
    """Places exactly 25 m apart, at the largest coordinates: every product is exact, so no shape changes the answer."""
    points = np.array([[6_378_137.0, 0, 25.0 * i] for i in range(50)])
    every = torch.arange(50)
    whole = near_of(points, 25, every, every)
    assert np.array_equal(whole, np.eye(50, dtype=bool))
    assert np.array_equal(near_of(points, 25.01, every, every), abs(np.subtract.outer(range(50), range(50))) <= 1)
    for a, c in ((1, 3), (7, 50), (13, 11)):
        parts = [near_of(points, 25, rows, every[:c]) for rows in every.split(a)]
        assert np.array_equal(np.concatenate(parts), whole[:, :c])


def test_points_that_are_nowhere_are_refused() -> None:
    for wrong in (np.nan, 7e6, np.inf):
        with pytest.raises(ValueError, match="Earth's centre, or nowhere"):
            NearPlaces(torch.tensor([[wrong, 0.0, 0.0]], dtype=torch.float64), 25)


def with_coordinates(shard_set: Path, out: Path, lat: list[float | None], lon: list[float | None]) -> Path:
    """A copy of a set's index whose coordinates are those of the given list, repeated."""
    table, _ = read_table(shard_set / "index.parquet")
    for name, values in (("lat", lat), ("lon", lon)):
        column = pa.array((values * len(table))[: len(table)], pa.float64())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    out.mkdir()
    write_index(out, table, read_index(shard_set).metadata)
    shutil.copytree(shard_set / "shards", out / "shards")
    return out


def test_a_place_is_where_the_mean_of_its_photographs_is(shard_set: Path, tmp_path: Path) -> None:
    index = read_index(shard_set)
    table = index.table.to_pydict()
    points = place_points([index])
    assert points.shape == (index.num_places, 3)
    for place in range(index.num_places):
        rows = index.rows(place)
        own = on_ellipsoid(np.array(table["lat"][rows]), np.array(table["lon"][rows]))
        np.testing.assert_allclose(points[place], own.mean(0), rtol=1e-12, atol=1e-6)
    some = with_coordinates(shard_set, tmp_path / "some", [1.0, None], [2.0, None])
    known = place_points([read_index(some)])
    assert np.allclose(known, on_ellipsoid(np.array([1.0]), np.array([2.0])))  # photographs with and without


@pytest.mark.parametrize(
    ("lat", "words"),
    [
        ([None], r"memory.min_negative_m needs coordinates, and 8 of 8 places have none \(first: place 0 of .*set\)"),
        ([float("nan")], "needs coordinates, and 8 of 8"),
        ([1.0], "all 8 places are within 0 m of each other"),
    ],
)
def test_places_without_coordinates_are_refused(
    lat: list[float | None], words: str, shard_set: Path, tmp_path: Path
) -> None:
    folder = with_coordinates(shard_set, tmp_path / "set", lat, [2.0])
    with pytest.raises(ValueError, match=words):
        points_for([read_index(folder)], "memory.min_negative_m", 25)


def test_sets_are_named_that_lack_coordinates(shard_set: Path, tmp_path: Path) -> None:
    without = with_coordinates(shard_set, tmp_path / "without", [None], [None])
    with pytest.raises(ValueError, match=r"8 of 16 places have none \(first: place 0 of .*without\)") as raised:
        points_for([read_index(shard_set), read_index(without)], "memory.min_negative_m", 25)
    assert "\n" not in str(raised.value)
    whole = points_for([read_index(shard_set)] * 2, "memory.min_negative_m", 25)
    assert len(whole) == 2 * read_index(shard_set).num_places
    assert share_with_neighbours(whole, 25) == 1  # each place is twice there
    assert share_with_neighbours(whole[: len(whole) // 2], 25) == 0


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "near"])
def test_distances_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="min_negative_m"):
        MemoryConfig.model_validate({"min_negative_m": value})


def test_a_loss_that_cannot_leave_pairs_out_is_refused(single_process: None) -> None:
    memory = MemoryConfig(size=8, min_negative_m=25)
    with pytest.raises(ValueError, match="min_negative_m works in tiles, and CircleLoss with none"):
        GlobalLoss(LossConfig(name="CircleLoss", miner="none"), memory)
    rows = torch.eye(4)
    with pytest.raises(ValueError, match="min_negative_m needs GlobalLoss"):
        GlobalLoss(LossConfig(), memory)(rows, torch.arange(4), MemoryQueue(8, 4), step=0)
