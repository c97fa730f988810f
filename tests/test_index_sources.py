"""What an index is built from: tables, shard sets, a benchmark's database. Names, positions and pictures are theirs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_pipeline.index import read_index
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.photo_list import list_source
from tests.indexes import tiny
from tests.photos import write_noise_benchmark

pytestmark = pytest.mark.usefixtures("single_process")

LAT = [48.1, 48.1002, np.nan, 48.2, -33.9, 48.1004, 48.5]
LON = [11.5, 11.5, np.nan, 11.6, 151.2, 11.5, 11.9]


def built(source: str, out: Path, data_root: Path = Path("data")) -> Index:
    build_index(tiny(), list_source(source, data_root), out)
    return Index.open(out)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a benchmark of noise, `town`."""
    folder = tmp_path_factory.mktemp("sources")
    write_noise_benchmark(folder / "town")
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["degrees", "metres"])
def test_a_table_in_its_order_with_its_positions(noise: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    photos = sorted((noise / "town" / "images" / "test" / "database").iterdir())
    for number, photo in enumerate(photos):
        shutil.copyfile(photo, tmp_path / f"{6 - number}.jpg")
    columns = {"lat": LAT, "lon": LON} if kind == "degrees" else {"east": [*range(0, 700, 100)], "north": [5.0] * 7}
    table = pd.DataFrame({"path": [f"{i}.jpg" for i in (3, 0, 1, 2, 4, 5, 6)], **columns})
    file = tmp_path / f"places{suffix}"
    table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
    index = built(str(file), tmp_path / "index")
    assert index.images.names == table["path"].tolist()
    (place,) = index.locate(tmp_path / "2.jpg", top_k=1)
    (best,) = place.candidates
    assert (best.name, best.number) == ("2.jpg", 3)
    assert index.path_of(3) == tmp_path / "2.jpg"
    if kind == "degrees":
        np.testing.assert_array_equal(index.images.positions.lat, LAT)
        np.testing.assert_array_equal(index.images.positions.lon, LON)
        assert (best.lat, best.lon) == (48.2, 11.6)
        assert [index.images.positions.zone[i] for i in (0, 2, 4)] == [32, 0, 56]
    else:
        assert index.images.positions.east.tolist() == [*range(0, 700, 100)]
        assert (best.east, best.north, best.zone) == (300.0, 5.0, 0)


def test_a_shard_set_by_its_rows(shard_set: Path, tmp_path: Path) -> None:
    index = built(str(shard_set), tmp_path / "index")
    table = read_index(str(shard_set)).table
    assert len(index) == len(table)
    for ours, theirs in ((index.images.positions.lat, "lat"), (index.images.positions.lon, "lon")):
        np.testing.assert_array_equal(ours, table[theirs].to_numpy())
    city, place, view = (table[name][7].as_py() for name in ("city", "city_place_id", "view"))
    assert index.images.names[7] == f"{city}_{place:07d}.{view:02d}.jpg"
    assert str(index.images.times[7])[:7] == f"{table['year'][7].as_py():04d}-{table['month'][7].as_py():02d}"
    data = list_source(str(shard_set)).read(7)
    (location,) = index.locate(data, top_k=3)
    assert (location.candidates[0].number, location.candidates[0].root) == (7, str(shard_set))
    assert location.candidates[0].similarity == pytest.approx(1, abs=1e-6)
    assert index.path_of(7) is None


@pytest.mark.parametrize("spec", [lambda root: f"folder:{root / 'town'}", lambda _: "town"])
def test_a_benchmarks_database(noise: Path, tmp_path: Path, spec: Callable[[Path], str]) -> None:
    index = built(spec(noise), tmp_path / "index", noise)
    assert index.images.positions.east.tolist() == [500000 + 100 * i for i in range(7)]
    assert set(index.images.positions.zone) == {33}
    assert all((path := index.path_of(i)) is not None and path.parent.name == "database" for i in range(7))
    with pytest.raises(ValueError, match="unknown benchmark 'twon'; nearest: town"):
        list_source("twon", noise)
