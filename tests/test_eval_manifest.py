"""Tables of one's own as benchmarks: columns, paths, rows without ground truth, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from eval.benchmarks.load import load_benchmarks
from tests.benchmark_folders import load, photo, photos, positives


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["place", "lat", "east"])
def test_manifest(tmp_path: Path, suffix: str, kind: str) -> None:
    table = pd.DataFrame(
        {
            "path": [f"{name}.jpg" for name in "abcqr"],
            "role": ["database"] * 3 + ["query"] * 2,
            "place": ["7", "8", "7", "7", "9"],
        }
    )
    if kind == "lat":  # one degree of longitude at 60 degrees north is half as long
        table = table.drop(columns="place").assign(lat=[60.0] * 5, lon=[10, 10.0004, 10.001, 10, 20.0])
    if kind == "east":
        table = table.drop(columns="place").assign(east=[0, 24, 26, 0, 5000.0], north=0.0)
    photos(tmp_path, table["path"].tolist())
    file = tmp_path / f"mine{suffix}"
    table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
    benchmark = load(f"manifest:{file.name}", tmp_path)
    assert positives(benchmark) == [[0, 2] if kind == "place" else [0, 1], []]
    assert "1 of 2 queries have no positive" in benchmark.notes[0]
    if kind == "east":
        assert positives(load(f"manifest:{file.name}:26", tmp_path))[0] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path,place\na.jpg,1\n", "expected path, role .database, query. and"),
        ("path,role,lat\na.jpg,database,1\n", "has the columns path, role, lat; expected"),
        ("path,role\na.jpg,database\n", "no row of role query"),
        ("path,role,place\na.jpg,databse,1\n", "row 2: role 'databse'; use database or query"),
        ("path,role,place\na.jpg,database,1\n,query,1\n", "row 3: path is empty"),
        ("path,role,lat,lon\na.jpg,database,1,x\na.jpg,query,1,1\n", "row 2: lon is 'x'; expected a finite number"),
        ("path,role,lat,lon\na.jpg,database,1,2\na.jpg,query,nan,1\n", "row 3: lat is 'nan'; expected a finite"),
        ("path,role,lat,lon\na.jpg,database,1,2\na.jpg,query,,1\n", "row 3: lat, lon are nan, 1.*both of them"),
        ("path,role,lat,lon\na.jpg,database,91,2\na.jpg,query,1,1\n", "row 2: lat, lon are 91, 2; expected -90 to 90"),
        (
            "path;role;lat;lon\na.jpg;database;48,5;9\na.jpg;query;48,5;9\n",
            "row 2: lat is '48,5'; a decimal comma; write 48.5",
        ),
        ("path,role,lat,lon\na.jpg,database,48,5,9,1\na.jpg,query,48,5,9,1\n", "decimal commas"),
        ("path,role,place\na.jpg,database,1\n", "no row of role query"),
        ("path,role,place\nb.jpg,database,1\na.jpg,query,1\n", "b.jpg"),
        ("path,role,place\na.jpg,database,1\na.jpg,query,2\n", "none of 1 queries has a positive"),
    ],
)
def test_wrong_manifests_are_answered_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load("manifest:m.csv", tmp_path)
    assert "\n" not in str(caught.value)


def test_rows_without_ground_truth_are_predicted_and_not_counted(tmp_path: Path) -> None:
    photos(tmp_path, [f"{name}.jpg" for name in "abqrs"])
    database = "a.jpg;database;60.5;10\nb.jpg;database;;\n"
    queries = "q.jpg;query;60.5;10\nr.jpg;Query;;\ns.jpg;query;61;10\n"
    (tmp_path / "m.csv").write_text(f"\ufeffpath;role; lat ;lon\n{database}{queries}")
    benchmark = load("manifest:m.csv", tmp_path)
    assert positives(benchmark) == [[0], [], []]
    assert (benchmark.num_labelled, benchmark.num_without_positive) == (2, 1)
    assert benchmark.protocol == "25 m radius, 2 of 3 queries"
    assert "1 of 2 database images have no position" in benchmark.notes[0]
    (tmp_path / "p.csv").write_text(
        "path,role,place\na.jpg,database,1\nb.jpg,database,\nq.jpg,query,1\nr.jpg,query,nan\n"
    )
    by_place = load("manifest:p.csv", tmp_path)
    assert positives(by_place) == [[0], []]
    assert by_place.protocol == "same place, 1 of 2 queries"
    assert "1 of 2 database images have no place" in by_place.notes[0]


@pytest.mark.parametrize(
    "content", ["path,role\na.jpg,database\nb.jpg,query\n", "path,role,place\na.jpg,database,1\nb.jpg,query,\n"]
)
def test_a_table_without_ground_truth_is_predicted(tmp_path: Path, content: str) -> None:
    photos(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "m.csv").write_text(content)
    (benchmark,) = load_benchmarks(["manifest:m.csv"], tmp_path, labels="found")
    assert benchmark.num_labelled == 0
    assert "no ground truth was found (m.csv" in benchmark.notes[0]


def test_ground_truth_that_is_not_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    photos(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "m.csv").write_text("path,role,lat,lon\na.jpg,database,148,9\nb.jpg,query,,\n")
    (benchmark,) = load_benchmarks(["manifest:m.csv"], tmp_path, labels="unused")
    assert benchmark.num_labelled == 0
    (tmp_path / "p.csv").write_text("path,role,place\na.jpg,database,1\nb.jpg,query,1\n")
    with pytest.raises(ValueError, match=r"has no positions; a radius of 25 m means nothing to it"):
        load("manifest:p.csv:25", tmp_path)


def test_paths_are_of_the_working_folder_or_of_the_tables_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, own = tmp_path / "here", tmp_path / "here/tables"
    photos(here, ["a.jpg", "b.jpg", "c.jpg"])
    photos(own, ["a.jpg", "d.jpg"])
    monkeypatch.chdir(here)
    for names, base, chosen in (
        (["a.jpg", "b.jpg"], "paths relative to the working folder", [Path("a.jpg"), Path("b.jpg")]),
        (["a.jpg", "d.jpg"], "paths relative to its own folder", [own / "a.jpg", own / "d.jpg"]),
        (["d.jpg", "c.jpg"], "1 paths relative to the working folder, 1 to its own", [own / "d.jpg", Path("c.jpg")]),
        ([str(own / "d.jpg"), str(here / "b.jpg")], "absolute paths", [own / "d.jpg", here / "b.jpg"]),
    ):
        (own / "m.csv").write_text(f"path,role,place\n{names[0]},database,1\n{names[1]},query,1\n")
        benchmark = load(f"manifest:{own / 'm.csv'}", tmp_path)
        assert [*benchmark.database, *benchmark.queries] == chosen
        assert benchmark.layout == f"m.csv, {base}"
