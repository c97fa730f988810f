"""What `inspect` says and draws."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.index import read_index
from data_pipeline.overview import draw_map, overview
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.sources.manifest import read_manifest
from launch.cli import main
from tests.photos import write_gsv_cities, write_jpegs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overview")
    write_gsv_cities(folder / "native")
    write_shards(read_gsv_cities(folder / "native"), folder / "set", ShardOptions(shard_bytes=12_000))
    return folder / "set"


def test_counts_are_those_of_the_set(shards: Path) -> None:
    seen, table = overview(read_index(shards)), pq.read_table(shards / "index.parquet")
    assert [(c.name, c.places, c.images) for c in seen.cities] == [
        ("Alta", 3, 14),
        ("Oslo", 3, 13),
        ("San-Juan_2", 2, 15),
    ]
    assert (seen.places, seen.images, seen.images_per_place) == (8, 42, (4, 4.0, 11))
    assert seen.widths == (min(table["width"].to_pylist()), np.median(table["width"]), max(table["width"].to_pylist()))
    years = table["year"].to_numpy()[:14]
    assert seen.cities[0].years == f"{years.min()}-{years.max()}"
    assert seen.shard_bytes == sum(tar.stat().st_size for tar in (shards / "shards").glob("*.tar"))


def test_inspect_prints_and_draws(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.parquet"
    command = ["inspect", str(shards), "--out", str(tmp_path / "look"), "--places", "5", "--views", "4"]
    assert main([*command, "--plan", str(plan), "--places-per-batch", "2", "--images-per-place", "3"]) == 0
    printed = capsys.readouterr().out
    assert "8 places, 42 images" in printed
    assert read_index(shards).digest in printed
    assert "2 places with too few images (5 images), 0 bad images" in printed
    assert "4 steps of 2 places x 3 views" in printed
    assert len(pq.read_table(plan)) == 8
    with Image.open(tmp_path / "look/contact_sheet.png") as sheet:
        assert sheet.size == (4 * 120, 5 * 134)
        assert len(sheet.getcolors(1 << 20) or []) > 500
    with Image.open(tmp_path / "look/map.png") as chart:
        assert chart.width > 500
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["contact_sheet.png", "map.png"]


def test_without_coordinates_there_is_no_map(tmp_path: Path) -> None:
    write_jpegs(tmp_path, 8, seed=0)
    (tmp_path / "mine.csv").write_text("\n".join(["path,place", *(f"{n}.jpg,{n // 4}" for n in range(8))]))
    write_shards(read_manifest(tmp_path / "mine.csv"), tmp_path / "set")
    index = read_index(tmp_path / "set")
    assert not draw_map(index, tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()
    assert overview(index).cities[0].years == "-"


def test_what_is_no_shard_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no index.parquet: not a shard set, or not finished" in capsys.readouterr().err
