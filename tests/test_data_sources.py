"""What else can be sharded: UTM folders, MSLS, tables; and the command line of all kinds."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.index import read_index
from data_pipeline.shards import write_shards
from data_pipeline.sources.cells import Grid, place_of_images
from data_pipeline.sources.manifest import read_manifest
from data_pipeline.sources.msls import read_msls
from data_pipeline.sources.track import read_track
from data_pipeline.sources.utm_folder import read_utm_folder
from data_pipeline.verify import verify_shards
from launch.cli import main
from tests.fuzz_places import msls_folder
from tests.photos import jpeg, write_gsv_cities

# Cells


def test_cells_and_sectors_make_places_and_groups_keep_them_apart() -> None:
    rng = np.random.default_rng(0)
    east, north, heading = rng.uniform(-80, 80, 4000), rng.uniform(0, 160, 4000), rng.uniform(-180, 540, 4000)
    heading[:5] = np.nan
    grid = Grid(cell_m=10, heading_deg=30, groups=3)
    suffix, place = place_of_images(east, north, heading, grid)
    by_place: dict[tuple[str, int], list[int]] = {}
    for image, key in enumerate(zip(suffix, place.tolist(), strict=True)):
        by_place.setdefault(key, []).append(image)
    spots: dict[str, list[tuple[float, float, float]]] = {}
    for (group, _), members in by_place.items():
        cells = {(east[i] // 10, north[i] // 10, heading[i] % 360 // 30 if i >= 5 else -1.0) for i in members}
        assert len(cells) == 1
        spots.setdefault(group, []).extend(cells)
    assert sum(map(len, spots.values())) == len({spot for some in spots.values() for spot in some})
    for group, cells in spots.items():
        assert sorted(p for g, p in by_place if g == group) == list(range(len(cells)))
        for one in cells:
            for other in cells:
                if one[:2] != other[:2]:
                    assert max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= 3
                elif one != other:
                    assert abs(one[2] - other[2]) >= 2
    assert set(place_of_images(east, north, heading, Grid(groups=1))[0]) == {""}
    with pytest.raises(ValueError, match="cells of 0 m"):
        Grid(cell_m=0)


# UTM folders


def utm_name(east: float, north: float, heading: str, number: int, zone: str = "32", stamp: str = "20190714") -> str:
    return f"@{east:.2f}@{north:.2f}@{zone}@U@48.1@11.5@pano{number}@@{heading}@@@@{stamp}@@.jpg"


def test_a_utm_folder_is_sharded_by_cell_and_heading(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    folder = tmp_path / "my.city"
    (folder / "sub").mkdir(parents=True)
    for number in range(20):
        east, heading = (505.0, "10") if number < 8 else (517.0, "10") if number < 14 else (517.0, "100")
        name = utm_name(east, 1003.0, heading, number)
        (folder / ("sub" if number % 2 else ".") / name).write_bytes(jpeg(rng))
    listing = read_utm_folder(folder, grid=Grid(groups=1))
    assert (listing.num_places, np.diff(listing.place_starts).tolist()) == (3, [8, 6, 6])
    write_shards(listing, tmp_path / "set")
    assert verify_shards(tmp_path / "set") == []
    rows = read_index(tmp_path / "set").table.to_pylist()
    assert {row["city"] for row in rows} == {"my-city"}
    assert (rows[0]["year"], rows[0]["month"], rows[0]["northdeg"], rows[0]["lat"]) == (2019, 7, 10, 48.1)
    assert {row["panoid"] for row in rows} == {f"pano{n}" for n in range(20)}
    assert read_utm_folder(folder, city="Ulm", grid=Grid(groups=2)).cities == ["Ulm-0-0-0", "Ulm-1-0-0", "Ulm-1-0-1"]
    (folder / utm_name(505, 1003, "", 99, zone="36", stamp="")).write_bytes(jpeg(rng))
    wider = read_utm_folder(folder, grid=Grid(groups=1), min_images_per_place=1)
    assert wider.cities == ["my-city-32", "my-city-36"]
    assert wider.images.to_pylist()[-1]["northdeg"] is None
    write_shards(wider, tmp_path / "unknown")
    assert verify_shards(tmp_path / "unknown") == []
    (folder / "photo.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"photo.jpg: its name holds no UTM coordinates; expected a name like @UTM_east"
    ):
        read_utm_folder(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_utm_folder(tmp_path / "nowhere")


def test_other_places_of_the_same_files_are_another_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    (tmp_path / "f").mkdir()
    for number in range(8):
        (tmp_path / "f" / utm_name(505 + number, 1003.0, "10", number)).write_bytes(jpeg(rng))
    write_shards(read_utm_folder(tmp_path / "f", grid=Grid(cell_m=100, groups=1)), tmp_path / "set")
    with pytest.raises(ValueError, match="holds another shard set"):
        write_shards(read_utm_folder(tmp_path / "f", grid=Grid(cell_m=100, groups=2)), tmp_path / "set")


# MSLS


def write_msls(folder: Path) -> None:
    rng = np.random.default_rng(2)
    for city in ("zurich", "trondheim"):
        for part in ("database", "query"):
            images = folder / "train_val" / city / part / "images"
            images.mkdir(parents=True)
            with (
                (images.parent / "postprocessed.csv").open("w", newline="") as post,
                (images.parent / "raw.csv").open("w", newline="") as raw,
            ):
                posts, raws = csv.writer(post), csv.writer(raw)
                posts.writerow(
                    ["", "key", "easting", "northing", "unique_cluster", "night", "control_panel", "view_direction"]
                )
                raws.writerow(["", "key", "lon", "lat", "ca", "captured_at", "pano"])
                keys = [f"{city[0]}{part[0]}-{n:03d}_x" for n in range(12)]
                for n, key in enumerate(keys):
                    posts.writerow([n, key, 1000.0 + n % 3 * 30, 2000.0, n, False, False, "Forward"])
                    (images / f"{key}.jpg").write_bytes(jpeg(rng))
                for n, key in reversed(list(enumerate(keys))):
                    raws.writerow([n, key, 8.5, 47.3, 45.0 + n % 3, "2017-03-01", n == 11])


def test_msls_training_folders_are_sharded(tmp_path: Path) -> None:
    write_msls(tmp_path)
    listing = read_msls(tmp_path, grid=Grid(groups=1))
    assert listing.cities == ["trondheim", "zurich"]
    assert (listing.num_places, listing.num_images) == (6, 44)  # 3 spots a city, two panoramas a city left out
    assert read_msls(tmp_path / "train_val", cities=["zurich"], grid=Grid(groups=1)).num_places == 3
    write_shards(listing, tmp_path / "set")
    assert verify_shards(tmp_path / "set") == []
    row = read_index(tmp_path / "set").table.to_pylist()[0]
    assert (row["city"], row["year"], row["month"], row["northdeg"], row["lon"]) == ("trondheim", 2017, 3, 45, 8.5)
    (tmp_path / "train_val/zurich/database/images/zd-003_x.jpg").unlink()
    with pytest.raises(ValueError, match=r"zurich/database/postprocessed\.csv row 5: .*zd-003_x\.jpg: missing"):
        write_shards(read_msls(tmp_path, grid=Grid(groups=1)), tmp_path / "other")
    (tmp_path / "train_val/zurich/query/raw.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"query/raw\.csv: missing"):
        read_msls(tmp_path)
    with pytest.raises(FileNotFoundError, match="as MSLS' training folders have"):
        read_msls(tmp_path / "nowhere")


# Manifests


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("named", [True, False])
def test_a_manifest_is_sharded(tmp_path: Path, kind: str, named: bool) -> None:
    rng = np.random.default_rng(3)
    (tmp_path / "p").mkdir()
    rows = []
    for n in range(20):
        (tmp_path / f"p/{n}.jpg").write_bytes(jpeg(rng))
        rows.append(
            {"path": f"p/{n}.jpg", "place": f"spot {n % 4}" if named else 7 + n % 4, "lat": 1.5, "lon": 2.5, "extra": 0}
        )
    table = pa.Table.from_pylist(rows)
    path = tmp_path / f"mine.{kind}"
    pq.write_table(table, path) if kind == "parquet" else pa.csv.write_csv(table, path)
    listing = read_manifest(path)
    assert (listing.cities, listing.num_places, listing.num_images) == (["mine"], 4, 20)
    write_shards(listing, tmp_path / "set")
    assert verify_shards(tmp_path / "set") == []
    found = read_index(tmp_path / "set").table.to_pylist()
    assert [row["city_place_id"] for row in found[::5]] == ([0, 1, 2, 3] if named else [7, 8, 9, 10])
    assert (found[0]["lat"], found[0]["lon"], found[0]["year"]) == (1.5, 2.5, None)
    samples = list(webdataset.WebDataset([str(tmp_path / "set/shards/train-000000.tar")], shardshuffle=False))
    assert samples[1]["02.jpg"] == (tmp_path / "p/9.jpg").read_bytes()


MANIFESTS = [
    ("file,place\na.jpg,1\n", "mine.csv: no column path; found file, place"),
    ("path,place\na.jpg,1\nb.jpg,\n", "mine.csv row 3: no place"),
    ("path,place,year\na.jpg,1,soon\n", "mine.csv row 2: year is 'soon'; expected a finite number"),
    ("path,place,city\na.jpg,1,St. Louis\n", "city 'St. Louis'; expected at most 64 letters"),
    ("path,place\na.jpg,-1\n", "mine.csv row 2: place is -1; expected 0 to "),
    ("path,place,lat,lon\na.jpg,1,,\nb.jpg,1,91,0\n", "mine.csv row 3: lat, lon are 91, 0"),
    ("path,place,lat\na.jpg,1,1\n", "mine.csv: a column lat, but no lon; a position is both"),
    ("path,place,month\na.jpg,1,13\n", "mine.csv row 2: month is 13; expected 1 to 12"),
    ("path,place\n", "mine.csv: no rows; expected one row per image"),
    ("path,place\na.jpg\n", "not a readable table"),
    ("path;lat;lon\na.jpg;48,1;9\n", "mine.csv row 2: lat is '48,1'; a decimal comma; write 48.1"),
    ("path,lat,lon\na.jpg,48,9\n\nb.jpg,9,148\nc.jpg,148,9\n", "mine.csv row 5: lat, lon are 148, 9"),
    ("path,lat,lon\na.jpg,inf,9\n", "mine.csv row 2: lat is 'inf'; expected a finite number"),
    ("path,lat,lon\na.jpg,480035974,90804331\n", "degrees times 10^7"),
    ("path,lat,lon\na.jpg,,\n", "no row has a position"),
    ("path,place,northdeg\na.jpg,1,north\n", "mine.csv row 2: northdeg is 'north'; expected a finite number"),
    ("path,place,year\na.jpg,1,2024.5\n", "mine.csv row 2: year is 2024.5; expected a whole number"),
    ("path,Path ,place\na.jpg,b.jpg,1\n", "the column path is there twice"),
]
TRACKS = [
    ("time,lat\n0,48\n", "no column lon"),
    ("time,lat,lon\nsoon,48,9\n", "row 2: time is 'soon'; expected seconds, or as 2024-05-01T10:30:00"),
    ("time,lat,lon\n0,48,9\n1,148,9\n", "row 3: lat, lon are 148, 9"),
    ("time,lat,lon\n,48,9\n", "row 2: time is ''"),
]


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        *((partial(read_manifest, min_images_per_place=1), *row) for row in MANIFESTS),
        *((read_track, *row) for row in TRACKS),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    tmp_path: Path, read: Callable[[Path], object], text: str, words: str
) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read(tmp_path / "mine.csv")
    assert "\n" not in str(error.value)


def test_a_table_with_positions_and_no_places_makes_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    lines = ["Path ; LAT;lon; northdeg"]
    for n in range(12):
        (tmp_path / f"{n}.JPG").write_bytes(jpeg(rng))
        lines.append(f"{n}.JPG; {48 + n // 6 * 1e-3};9.5;{[359.7, 12.4, 100.0][n % 3]}")
    lines.append("nowhere.jpg;;;")
    (tmp_path / "my walk 2024.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    listing = read_manifest(tmp_path / "my walk 2024.csv", grid=Grid(groups=1, heading_deg=90), min_images_per_place=1)
    assert (listing.cities, listing.notes) == (["my-walk-2024"], ("left out: 1 rows without a position",))
    assert np.diff(listing.place_starts).tolist() == [2, 2, 2, 2, 2, 2]
    assert sorted(set(listing.images["northdeg"].to_pylist())) == [0, 12, 100]
    rows = [f"{n}.JPG,{500000 + n // 6 * 100},5300000" for n in range(12)]
    (tmp_path / "metres.csv").write_text("\n".join(["path,east,north", *rows]))
    assert read_manifest(tmp_path / "metres.csv").num_places == 2


CASES = Path(os.environ.get("RERANKVPR_TEST_CASES", ""))


@pytest.mark.skipif(not (CASES / "own_train").is_dir(), reason="RERANKVPR_TEST_CASES names no folder with own_train/")
@pytest.mark.parametrize(
    "name", ["mine", "mine_back", "mine_bom", "mine_date", "mine_north", "mine_semi", "mine_spaces", "my data 2024"]
)
def test_tables_as_people_write_them_are_read(name: str) -> None:
    listing = read_manifest(CASES / "own_train" / f"{name}.csv", min_images_per_place=2)
    assert (listing.num_places, listing.num_images) == (12, 48)
    assert all((listing.source / file).is_file() for file in listing.images["file"].to_pylist())


# The command line


def test_commands_of_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = tmp_path / "native"
    write_gsv_cities(native, {"Aachen": dict.fromkeys(range(6), 4), "Bergen": {i: 4 + i % 4 for i in range(50)}})
    assert main(["shard"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {kind} " in printed for kind in ("gsv-cities", "utm", "msls", "manifest"))
    write_msls(tmp_path / "msls")
    common = ["--shard-mb", "1", "--threads", "1"]
    assert main(["shard", "msls", str(tmp_path / "msls"), str(tmp_path / "a"), "--groups", "1", *common]) == 0
    assert "6 places, 44 images; 1 shards written" in " ".join(capsys.readouterr().out.split())
    out = ["shard", "gsv-cities", str(native), str(tmp_path / "b"), "--cities", "Bergen", "--shuffle", "1", *common]
    assert main([*out, "--part", "0/2"]) == 0
    assert "1 shards written of part 0/2; the index is written by a last run without --part" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(out) == 0
    assert "1 from the interrupted run used again" not in capsys.readouterr().out
    assert verify_shards(tmp_path / "b") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shard", "gsv", "a", "b"], "unknown kind of data set 'gsv'; nearest: gsv-cities"),
        (["shard", "gsv-cities", "a", "b", "--part", "2"], "--part 2: expected i/n, from 0/n to n-1/n"),
        (["shard", "manifest", "nowhere.csv", "b"], "nowhere.csv: no such file; give a CSV or Parquet table"),
        (["shard", "utm", "nowhere", "b", "--cell-m", "0"], "a grid of cells of 0.0 m"),
        (["verify", "s3://bucket/set"], "verify reads sets of this machine"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("part", ["database", "query"])
def test_a_part_of_an_msls_city_without_images_is_one_of_none(part: str, tmp_path: Path) -> None:
    msls_folder(tmp_path, ("cph",))
    table = tmp_path / "train_val" / "cph" / part / "postprocessed.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    assert read_msls(tmp_path, min_images_per_place=1).num_images == 7  # of eight of the other part, one is a panorama
