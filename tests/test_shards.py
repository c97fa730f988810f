"""Shard sets: any reader gets the source bytes, nothing is lost unnamed, what is wrong in a source is named."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.index import read_index
from data_pipeline.photos import read_photo
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.verify import verify_shards
from tests.photos import SMALL_SHARD, THREE_CITIES, contents

KEPT = {(c, p): n for c in sorted(THREE_CITIES) for p, n in sorted(THREE_CITIES[c].items()) if n >= 4}


def csv_row(file: Path, native: Path) -> int:
    """The line of the CSV that names a photograph, by another reader than the one under test."""
    with (native / "Dataframes" / f"{file.parent.name}.csv").open(newline="") as lines:
        reader = csv.DictReader(lines)
        return next(reader.line_num for row in reader if file.stem.endswith(f"_{row['panoid']}"))


# The index


def test_index_has_the_columns_counts_and_digests_of_the_contract(shard_set):
    table = pq.read_table(shard_set / "index.parquet")
    assert " ".join(table.column_names) == (
        "place_id city city_place_id view shard offset size crc32 width height lat lon year month northdeg panoid"
    )
    assert table.schema.field("place_id").type == pa.int64()
    said = json.loads(table.schema.metadata[b"rerankvpr"])
    assert said["format_version"] == 1
    assert (said["images"], said["places"], said["cities"]) == (sum(KEPT.values()), len(KEPT), 3)
    assert (said["places_left_out"], said["images_left_out"], said["bad"]) == (2, 5, [])
    tars = sorted((shard_set / "shards").iterdir())
    assert [shard["name"] for shard in said["shards"]] == [f"shards/{tar.name}" for tar in tars]
    assert [tar.name for tar in tars] == [f"train-{n:06d}.tar" for n in range(len(tars))]
    assert len(tars) > 3
    for tar, shard in zip(tars, said["shards"], strict=True):
        assert shard["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
    digest = hashlib.sha256((shard_set / "index.parquet").read_bytes()).hexdigest()
    assert (shard_set / "index.parquet.sha256").read_text() == f"{digest}  index.parquet\n"


def test_place_ids_are_dense_over_cities_in_city_and_place_order(shard_set):
    index = read_index(shard_set)
    firsts = index.table.take(index.place_starts[:-1]).select(["place_id", "city", "city_place_id"]).to_pylist()
    assert [(row["city"], row["city_place_id"]) for row in firsts] == list(KEPT)
    assert [row["place_id"] for row in firsts] == list(range(len(KEPT)))
    assert index.num_views.tolist() == list(KEPT.values())
    assert [index.cities[c] for c in index.place_city] == [city for city, _ in KEPT]
    assert index.num_places == len(KEPT)
    assert index.num_images == sum(KEPT.values())


def test_one_range_read_holds_all_views_of_a_place(shard_set, native):
    index = read_index(shard_set)
    for place, key in enumerate(KEPT):
        rows = index.rows(place)
        start = int(index.offset[rows][0])
        with index.shard_path(place).open("rb") as tar:
            tar.seek(start)
            data = tar.read(int(index.offset[rows][-1] + index.size[rows][-1]) - start)
        source_bytes = sum(file.stat().st_size for file in native[1][key])
        assert len(data) < source_bytes + 1024 * len(native[1][key])
        for view, file in enumerate(native[1][key]):
            row = index.table.slice(rows.start + view, 1).to_pylist()[0]
            jpeg = data[row["offset"] - start :][: row["size"]]
            assert jpeg == file.read_bytes()
            assert row["crc32"] == zlib.crc32(jpeg)
            photo = read_photo(file)
            assert (row["width"], row["height"]) == (photo.width, photo.height)
            name = f"{row['city']}_{row['city_place_id']:07d}_{row['year']}_{row['month']:02d}_{row['northdeg']:03d}_"
            assert file.name.startswith(name)
            assert file.name.endswith(f"_{row['panoid']}.jpg")
            assert [float(d) for d in file.name[len(name) :].split("_")[:2]] == [row["lat"], row["lon"]]


# The tars


def test_plain_webdataset_yields_the_source_bytes(shard_set, native):
    tars = sorted(str(tar) for tar in (shard_set / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{city}_{place:07d}" for city, place in KEPT]
    for sample, key in zip(samples, KEPT, strict=True):
        views = {f"{view:02d}.jpg": file.read_bytes() for view, file in enumerate(native[1][key])}
        assert {name: data for name, data in sample.items() if name.endswith(".jpg")} == views
        assert [view["file"] for view in json.loads(sample["json"])["views"]] == [f.name for f in native[1][key]]


def test_tars_say_nothing_of_the_machine(shard_set):
    for path in (shard_set / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_bytes_are_the_same_every_time(shard_set, own_native, tmp_path):
    for file in own_native[0].rglob("*.jpg"):
        os.utime(file, (1, 1))
    write_shards(read_gsv_cities(own_native[0]), tmp_path / "again", ShardOptions(shard_bytes=SMALL_SHARD, threads=1))
    assert contents(tmp_path / "again") == contents(shard_set)


@given(
    place_bytes=st.lists(st.integers(0, 1000), max_size=60),
    shard_bytes=st.integers(1, 3000),
)
def test_plan_keeps_order_takes_every_place_once_and_fills_shards(place_bytes, shard_bytes):
    plan = plan_shards(np.array(place_bytes, dtype=np.int64), shard_bytes)
    assert [place for start, stop in plan for place in range(start, stop)] == list(range(len(place_bytes)))
    totals = [sum(place_bytes[start:stop]) for start, stop in plan]
    assert all(total <= shard_bytes or stop - start == 1 for total, (start, stop) in zip(totals, plan, strict=True))
    for total, (start, _) in zip(totals, plan[1:], strict=False):
        assert total + place_bytes[start] > shard_bytes


# Choosing places


@pytest.mark.parametrize(("least", "left_out"), [(1, 0), (4, 2), (5, 7)])
def test_small_places_are_left_out_and_counted(native, least, left_out):
    listing = read_gsv_cities(native[0], min_images_per_place=least)
    assert listing.places_left_out == left_out
    assert listing.num_places == 10 - left_out
    assert listing.num_images + listing.images_left_out == 47


def test_cities_can_be_chosen(native):
    listing = read_gsv_cities(native[0], cities=["Oslo", "Alta"])
    assert (listing.cities, listing.num_places) == (["Alta", "Oslo"], 6)
    with pytest.raises(ValueError, match="no city Olso; there are Alta, Oslo, San-Juan_2"):
        read_gsv_cities(native[0], cities=["Olso"])


# Bad photographs


def damage(files: dict[tuple[str, int], list[Path]]) -> list[tuple[Path, str]]:
    """Four photographs spoilt in four ways."""
    missing, cut, foreign, empty = (
        files["Oslo", 12][2], files["San-Juan_2", 6][0], files["San-Juan_2", 6][9], files["Alta", 3][1],
    )  # fmt: skip
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(900))
    empty.write_bytes(b"")
    return [(empty, "empty"), (missing, "missing"), (cut, "truncated or damaged JPEG"), (foreign, "not a JPEG")]


def test_bad_photographs_are_named_with_their_csv_row_and_left_out(own_native, tmp_path):
    folder, files = own_native
    bad = damage(files)
    summary = write_shards(
        read_gsv_cities(folder), tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD, max_bad=0.1)
    )
    named = [(b.csv, b.row, b.file, b.reason) for b in summary.bad]
    assert named == [
        (f"Dataframes/{f.parent.name}.csv", csv_row(f, folder), f.relative_to(folder).as_posix(), reason)
        for f, reason in bad
    ]
    # Alta's place 3 had four images: with three left it goes too.
    assert (summary.places, summary.places_left_out, summary.images_left_out) == (len(KEPT) - 1, 3, 5 + 3)
    assert summary.images == sum(KEPT.values()) - 3 - 4
    index = read_index(tmp_path / "set")
    assert index.num_places == summary.places
    assert verify_shards(tmp_path / "set") == []
    assert (
        write_shards(read_gsv_cities(folder), tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD)).bad
        == summary.bad
    )


@pytest.mark.parametrize(("spoilt", "reason"), [(1, "missing"), (2, "truncated or damaged JPEG"), (3, "not a JPEG")])
def test_more_bad_photographs_than_max_bad_stop_the_run_with_nothing_left(own_native, tmp_path, spoilt, reason):
    folder, files = own_native
    keep = contents(folder)
    bad = damage(files)[spoilt][0]
    for name, data in keep.items():
        if folder / name != bad:
            (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match="stopped at 1 unreadable photographs of 42") as error:
        write_shards(read_gsv_cities(folder), tmp_path / "set")
    where = f"Dataframes/{bad.parent.name}.csv row {csv_row(bad, folder)}: {bad.relative_to(folder).as_posix()}"
    assert str(error.value).endswith(f"{where}: {reason}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "set").exists()


def test_after_max_bad_only_finished_tars_remain_and_are_reused_once_it_is_repaired(own_native, tmp_path, shard_set):
    folder, files = own_native
    file = files["San-Juan_2", 6][0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    listing = read_gsv_cities(folder)
    with pytest.raises(ValueError, match="truncated or damaged JPEG"):
        write_shards(listing, tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD))
    assert not (tmp_path / "set" / "index.parquet").exists()
    assert not list((tmp_path / "set").rglob("*.partial"))
    file.write_bytes(whole)
    assert write_shards(listing, tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD)).shards_reused > 2
    assert contents(tmp_path / "set") == contents(shard_set)


def test_every_cut_of_a_photograph_is_seen(native, tmp_path):
    rng = np.random.default_rng(5)
    file = tmp_path / "cut.jpg"
    for source in [files[0] for files in native[1].values()]:
        data = source.read_bytes()
        for length in [len(data) - 1, len(data) - 2, 2, *rng.integers(3, len(data) - 2, size=6).tolist()]:
            file.write_bytes(data[:length])
            assert read_photo(file) == "truncated or damaged JPEG"


# What people get wrong in the source


def edit(folder: Path, city: str, old: str, new: str) -> Path:
    path = folder / "Dataframes" / f"{city}.csv"
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    return path


def test_missing_folders_are_named(tmp_path, own_native):
    with pytest.raises(FileNotFoundError, match="nowhere: no folder Dataframes"):
        read_gsv_cities(tmp_path / "nowhere")
    (tmp_path / "bare/Dataframes").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no CSV"):
        read_gsv_cities(tmp_path / "bare")
    shutil.rmtree(own_native[0] / "Images/Oslo")
    with pytest.raises(FileNotFoundError, match="no folder Images/Oslo"):
        write_shards(read_gsv_cities(own_native[0]), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_csv_without_a_column_is_refused(own_native):
    path = edit(own_native[0], "Oslo", "panoid", "pano")
    with pytest.raises(ValueError, match=r"Oslo.csv: no column panoid; expected place_id, year.*found comment, place"):
        read_gsv_cities(own_native[0])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"Oslo.csv: empty; expected a CSV with the columns place_id"):
        read_gsv_cities(own_native[0])
    path.write_text("place_id,year,month,northdeg,city_id,lat,lon,panoid\n")
    with pytest.raises(ValueError, match=r"Oslo.csv: a header without rows"):
        read_gsv_cities(own_native[0])


ROW = "3,2020,5,10,Oslo,59.9,10.7,aa"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("3,2020,5,10,Oslo,59.9,10.7", "Expected 8 columns, got 7"),
        ("x3,2020,5,10,Oslo,59.9,10.7,aa", "row 5: place_id is 'x3'; expected a whole number"),
        ("3,2020,13,10,Oslo,59.9,10.7,aa", "row 5: month is '13'; expected 1 to 12"),
        ("3,2020,5,10.5,Oslo,59.9,10.7,aa", "row 5: northdeg is '10.5'; expected a whole number of degrees"),
        ("3,2020,5,10,Oslo,nan,10.7,aa", "row 5: lat is 'nan'; expected degrees"),
        ("3,2020,5,10,Oslo,59.9,10.7,../../aa", "row 5: panoid is '../../aa'; expected a name without slashes"),
        ("3,2020,5,10,St.Louis,59.9,10.7,aa", "row 5: city_id is 'St.Louis'; expected at most 64 letters"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_row(tmp_path, row, message):
    path = tmp_path / "Dataframes/Oslo.csv"
    path.parent.mkdir()
    path.write_text(f"place_id,year,month,northdeg,city_id,lat,lon,panoid\n{ROW}\n\n{ROW}\n{row}\n{ROW}\n")
    with pytest.raises(ValueError, match=r"Oslo\.csv") as error:
        read_gsv_cities(tmp_path, min_images_per_place=1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_that_cannot_be_are_refused(native, tmp_path):
    with pytest.raises(ValueError, match="none of 10 places has 12 images"):
        read_gsv_cities(native[0], min_images_per_place=12)
    with pytest.raises(ValueError, match="min_images_per_place is 0"):
        read_gsv_cities(native[0], min_images_per_place=0)
    listing = read_gsv_cities(native[0])
    with pytest.raises(ValueError, match="max_bad is 2"):
        write_shards(listing, tmp_path / "set", ShardOptions(max_bad=2))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file"):
        write_shards(listing, tmp_path / "file")
