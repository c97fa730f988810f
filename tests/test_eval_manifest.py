"""Tables of one's own as benchmarks: columns, paths, rows without ground truth, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

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
