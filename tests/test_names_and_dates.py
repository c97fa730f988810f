"""Names that are not UTF-8 and years of no calendar, in all that lists folders or reads dates: counted, or one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.files import write_whole
from data_pipeline.dates import years_and_months
from data_pipeline.folder_lock import FolderLock, lock_of
from data_pipeline.index import INDEX, INDEX_DIGEST, read_table, write_table
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.sources.manifest import read_manifest
from data_pipeline.sources.msls import read_msls
from data_pipeline.sources.photo_folder import read_photo_folder
from data_pipeline.sources.track import read_track
from data_pipeline.sources.utm_folder import read_utm_folder
from eval.benchmarks.load import load_benchmarks
from eval.features import files_digest
from eval.index.photo_list import list_source
from eval.report.show import _name
from launch.locate_command import _queries
from launch.show_images import _photographs
from tests.fuzz_places import msls_folder
from tests.phones import at, photograph
from tests.photos import jpeg, write_gsv_cities
from trainer.errors import lines_of

YEAR = 2**40
COUNTED = "names that are not UTF-8 2"


def utm(number: int, time: str = "202005") -> str:
    return f"@{500000 + number}@4000000@33@T@@@{number}@@@@@@{time}@@.jpg"


def write(folder: Path, names: list[str], write_one: Callable[[Path], object]) -> Path:
    """A folder of photographs, and two more that have names which are not UTF-8, one by its folder."""
    for name in (*names, os.fsdecode(b"\xff.jpg"), os.fsdecode(b"\xfe/b.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_one(folder / name)
    return folder


def test_names_that_are_not_utf_8_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder above is of such a name as well, and its photographs are used all the same."""
    home, names = tmp_path / os.fsdecode(b"caf\xe9"), [utm(number) for number in range(4)]
    rng = np.random.default_rng(0)
    folder = write(home / "photos", names, lambda path: path.write_bytes(jpeg(rng)))
    assert COUNTED in " ".join(read_utm_folder(folder).notes)
    listed = list_source(str(folder))
    assert listed.names == names
    assert COUNTED in " ".join(listed.notes)
    (tmp_path / "plain").symlink_to(folder)
    assert [name for name, _ in _queries((str(tmp_path / "plain"),))] == names
    assert COUNTED in capsys.readouterr().err
    assert [image.name for image in _photographs((folder,), 8)] == names
    phone = write(home / "phone", ["a.jpg", "b.jpg"], lambda path: photograph(path, gps=at(48.0, 9.0)))
    assert COUNTED in read_photo_folder(phone).note
    for part in ("database", "queries"):
        write(home / "town" / part, names, lambda path: path.write_bytes(jpeg(rng)))
    (benchmark,) = load_benchmarks([f"folder:{home / 'town'}"], tmp_path)
    assert (len(benchmark.database), len(benchmark.queries)) == (4, 4)
    assert sum(COUNTED in note for note in benchmark.notes) == 2
    assert files_digest(benchmark.database) != files_digest(benchmark.queries)


def test_a_city_whose_name_is_not_utf_8_is_one_line_that_names_it(tmp_path: Path) -> None:
    msls_folder(tmp_path, ("Koeln",))
    (tmp_path / "train_val" / "Koeln").rename(tmp_path / "train_val" / os.fsdecode(b"K\xf6ln"))
    with pytest.raises(ValueError, match=r".*") as caught:
        read_msls(tmp_path, min_images_per_place=1)
    (line,) = lines_of(caught.value)
    assert "K\\udcf6ln" in line
    assert "is not UTF-8" in line


@pytest.mark.parametrize("name", [b"\xff", b"caf\xe9/run"])
def test_no_output_has_such_a_name(name: bytes, tmp_path: Path) -> None:
    """A training would write checkpoints there that no library reads."""
    for lock in (FolderLock(tmp_path / os.fsdecode(name), "test"), lock_of(tmp_path / os.fsdecode(name), "test")):
        with pytest.raises(ValueError, match=r"a name that is not UTF-8; give another"):
            lock.acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_report_writes_such_a_name_as_escapes(tmp_path: Path) -> None:
    assert _name(tmp_path / os.fsdecode(b"caf\xe9") / "a.jpg", 0) == "caf\\udce9/a.jpg"
    write_whole(tmp_path / "page.html", f"<h1>{os.fsdecode(bytes([0xFF]))}</h1>")
    assert (tmp_path / "page.html").read_text() == "<h1>\\udcff</h1>"


# Years


def test_dates_are_read_and_others_counted() -> None:
    texts = ["2019-05-01", "201912", "20190131", "20190131T2359", "20190131235959", "1850-06", "", None]
    odd = [str(YEAR), "1712345678", "1712345678901", "201913", "2019-00", "20190532", "x", "٢٠١٩٠٥"]
    year, month, notes = years_and_months([*texts, *odd], "timestamps")
    assert year.to_pylist() == [2019] * 5 + [1850] + [None] * (2 + len(odd))
    assert month.to_pylist() == [5, 12, 1, 1, 1, 6] + [None] * (2 + len(odd))
    assert notes == [f"{len(odd)} timestamps are no dates and are not used, the first '{YEAR}'"]
    assert years_and_months(texts, "timestamps")[2] == []


def test_a_year_of_no_calendar_is_counted_where_names_say_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / utm(number, str(YEAR) if number else "202005")).write_bytes(jpeg(rng))
    listing = read_utm_folder(tmp_path)
    assert sorted(listing.images["year"].to_pylist(), key=str) == [2020, None, None, None]
    assert f"3 timestamps are no dates and are not used, the first '{YEAR}'" in listing.notes
    msls_folder(tmp_path / "msls", ("cph",))
    for raw in (tmp_path / "msls").rglob("raw.csv"):
        raw.write_text(raw.read_text().replace("2019-05-01", f"{YEAR}-05-01"))
    listing = read_msls(tmp_path / "msls", min_images_per_place=1)
    assert set(listing.images["year"].to_pylist()) == {None}
    assert "values of captured_at in cph are no dates" in listing.notes[0]


def _manifest(folder: Path) -> object:
    (folder / "x.csv").write_text(f"path,place,year\na.jpg,1,2020\nb.jpg,1,{YEAR}\n")
    return read_manifest(folder / "x.csv", min_images_per_place=1)


def _manifest_parquet(folder: Path) -> object:
    pq.write_table(pa.table({"path": ["a", "b"], "place": [1, 1], "year": [2020, YEAR]}), folder / "x.parquet")
    return read_manifest(folder / "x.parquet", min_images_per_place=1)


def _gsv(folder: Path) -> object:
    write_gsv_cities(folder, {"Oslo": {3: 4}})
    file = folder / "Dataframes" / "Oslo.csv"
    lines = [line.split(",") for line in file.read_text().splitlines()]
    lines[2][lines[0].index("year")] = str(YEAR)
    file.write_text("\n".join(",".join(line) for line in lines))
    return read_gsv_cities(folder)


def _track(folder: Path) -> object:
    (folder / "x.csv").write_text(f"time,lat,lon\n2020-01-01,48,9\n{YEAR}-01-01,48,9\n")
    return read_track(folder / "x.csv")


@pytest.mark.parametrize("read", [_manifest, _manifest_parquet, _gsv, _track])
def test_a_year_of_no_calendar_is_one_line_with_its_row(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".*") as caught:
        read(tmp_path)
    (line,) = lines_of(caught.value)
    assert str(YEAR) in line
    assert "row" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("column", "values", "odd"),
    [("year", [-5, 2**31 - 1, 0, None, 9999], 2), ("month", [13, -1, 0, None, 12], 2)],
)
def test_an_index_with_years_of_no_calendar_is_used_without_them(
    column: str, values: list[Any], odd: int, shard_set: Path, tmp_path: Path
) -> None:
    table, said = read_table(shard_set / INDEX)
    cells = [*values, *table[column].to_pylist()[len(values) :]]
    array = pa.array(cells, table.schema.field(column).type)
    write_table(tmp_path / INDEX, table.set_column(table.column_names.index(column), column, array), said)
    assert not (tmp_path / INDEX_DIGEST).exists()
    listed = list_source(str(tmp_path))
    assert listed.when is not None
    assert np.isnat(listed.when[:2]).all()
    assert not np.isnat(listed.when[len(values) :]).any()
    assert f"{odd} photographs have a year or month that is none" in " ".join(listed.notes)


@pytest.mark.parametrize("column", ["city_place_id", "width"])
def test_an_index_with_gaps_is_one_line(column: str, shard_set: Path, tmp_path: Path) -> None:
    table, said = read_table(shard_set / INDEX)
    gaps = pa.array([None, *table[column].to_pylist()[1:]], table.schema.field(column).type)
    write_table(tmp_path / INDEX, table.set_column(table.column_names.index(column), column, gaps), said)
    with pytest.raises(ValueError, match=rf"{INDEX}: a row without {column}; shard the data again"):
        list_source(str(tmp_path))
