"""A table of one's own as a benchmark: images, their roles and, where it is known, their ground truth."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading, reason, shown
from data_pipeline.positions import Positions, from_lat_lon, from_metres
from data_pipeline.table_cells import column_of_numbers
from eval.benchmarks.benchmark import (
    RADIUS_M,
    Benchmark,
    BenchmarkError,
    Whereabouts,
    make_benchmark,
    without_labels,
)
from eval.benchmarks.camera import by_camera
from eval.benchmarks.ground_truth import check_name
from eval.benchmarks.photographs import existing
from eval.benchmarks.places import by_radius, taken

ROLES = ("database", "query")
_OTHER_NAMES = {"latitude": "lat", "longitude": "lon", "lng": "lon", "easting": "east", "northing": "north"}
_EXPECTED = "path, role (database, query) and, where there is ground truth, place / lat, lon / east, north"
_HEADER = 1  # lines above the first row
_NO_PLACE = frozenset(("", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "None", "NULL", "null"))


def manifest(name: str, file: Path, radius_m: float | None = None, *, labels: bool = True) -> Benchmark:
    """A CSV or Parquet table with the columns `path`, `role` (database or query), and `place`, `lat` and `lon`, or
    `east` and `north` (metres; `zone`, such as 33N, says their UTM zone).

    Rows without ground truth are allowed: such a query is predicted and not counted, such a database image is nobody's
    positive. Without those columns the GPS in the photographs' EXIF counts; without that, or `labels`, there is no
    recall at all. Paths are relative to the working folder
    if all images are there, otherwise to the table's own. Raises ValueError naming row and column.
    """
    table = _read(file)
    columns = table.keys()
    keys = next((k for k in (["east", "north"], ["lat", "lon"], ["place"]) if set(k) <= columns), [])
    half = [column for column in ("east", "north", "lat", "lon") if column in columns and not keys]
    if half or not {"path", "role"} <= columns:
        raise BenchmarkError(f"manifest {file} has the columns {shown(', '.join(columns))}; expected {_EXPECTED}")
    roles = [_role(file, row, role) for row, role in enumerate(table["role"])]
    for row, path in enumerate(table["path"]):
        if not path:
            raise BenchmarkError(f"manifest {file}, row {row + 1 + _HEADER}: path is empty")
        check_name(path, f"manifest {file}, row {row + 1 + _HEADER}")
    of = {role: np.flatnonzero(np.array(roles) == role) for role in ROLES}
    for role in ROLES:
        if not len(of[role]):
            raise BenchmarkError(f"manifest {file} has no row of role {role}")
    at = _positions(table, keys, file) if labels and keys not in ([], ["place"]) else None
    paths, base = _paths(table["path"], file)
    database, queries = ([paths[row] for row in of[role]] for role in ROLES)
    if at is not None:
        where = Whereabouts(taken(at, of["database"]), taken(at, of["query"]))
        benchmark = by_radius(name, database, queries, where, radius_m or RADIUS_M, at.notes)
    elif keys == ["place"] and labels:
        places = ["" if place in _NO_PLACE else place for place in table["place"]]
        benchmark = _same_place(name, database, queries, *([places[row] for row in of[role]] for role in ROLES))
    else:
        benchmark, source = by_camera(name, database, queries, radius_m or RADIUS_M, labels=labels)
        base = f"{base}, {source}" if labels else base
    if labels and benchmark.at is None and radius_m is not None:
        raise BenchmarkError(f"manifest {file} has no positions; a radius of {radius_m:g} m means nothing to it")
    return replace(benchmark, layout=f"{file.name}, {base}")


def _same_place(
    name: str,
    database: Sequence[Path],
    queries: Sequence[Path],
    database_places: Sequence[str],
    query_places: Sequence[str],
) -> Benchmark:
    rows: dict[str, list[int]] = {}
    for number, place in enumerate(database_places):
        rows.setdefault(place, []).append(number)
    lost = len(rows.pop("", []))
    labelled_Q = np.array([bool(place) for place in query_places])
    if not rows or not labelled_Q.any():
        return without_labels(name, database, queries)
    notes = [f"{lost} of {len(database)} database images have no place and are no query's"] if lost else []
    positives = [np.array(rows.get(place, []), dtype=np.int64) for place in query_places]
    counted = "all queries" if labelled_Q.all() else f"{int(labelled_Q.sum())} of {len(queries)} queries"
    return make_benchmark(name, f"same place, {counted}", database, queries, positives, notes, labelled_Q=labelled_Q)


def _positions(table: dict[str, list[str]], keys: list[str], file: Path) -> Positions:
    where = f"manifest {file},"
    first, second = (column_of_numbers(table[key], key, where) for key in keys)
    if keys == ["lat", "lon"]:
        return from_lat_lon(first, second, where, missing_ok=True)
    return from_metres(first, second, where, zones=table.get("zone"), missing_ok=True)


def _role(file: Path, row: int, role: str) -> str:
    if role.lower() not in ROLES:
        raise BenchmarkError(f"manifest {file}, row {row + 1 + _HEADER}: role {shown(role)!r}; use database or query")
    return role.lower()


def _read(file: Path) -> dict[str, list[str]]:
    """The table's columns as texts without spaces around them; an empty one is "".

    Columns are separated by commas, or by the semicolons or tabulators that the header has.
    """
    import pandas as pd

    if not file.is_file():
        raise FileNotFoundError(f"manifest {file} does not exist")
    with reading(f"manifest {file}", "a readable table", BenchmarkError), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # values that are dropped
        if file.suffix == ".parquet":
            table = pd.read_parquet(io.BytesIO(file.read_bytes()))
        else:
            text = file.read_text(encoding="utf-8-sig")
            table = _parsed(file, text)
        columns = [str(column).strip() for column in table.columns]
        columns = [_OTHER_NAMES.get(column.lower(), column) for column in columns]
        texts = [_texts(table.iloc[:, number]) for number in range(len(columns))]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise BenchmarkError(f"manifest {file} has the column {shown(twice[0])} twice")
    return dict(zip(columns, texts, strict=True))


def _parsed(file: Path, text: str) -> Any:
    import pandas as pd

    try:
        return pd.read_csv(io.StringIO(text), sep=_separator(text), dtype=str, index_col=False, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise BenchmarkError(
            f"manifest {file}: a row has more values than there are columns ({reason(error)}); decimal commas?"
        ) from error


def _separator(text: str) -> str:
    header = text.partition("\n")[0]
    return max((",", ";", "\t"), key=header.count)


def _texts(column: Any) -> list[str]:
    import pandas as pd

    return ["" if pd.isna(value) else str(value).strip() for value in column]


def _paths(names: Sequence[str], file: Path) -> tuple[list[Path], str]:
    """The images of a table, all of which exist, and what their paths are relative to."""
    if all(Path(name).is_absolute() for name in names):
        return existing([Path(name) for name in names], file), "absolute paths"
    here = [Path(name) for name in names]
    if all(path.is_file() for path in here):
        return here, "paths relative to the working folder"
    beside = [file.parent / name for name in names]
    either = [a if b is not a and not b.is_file() and a.is_file() else b for a, b in zip(here, beside, strict=True)]
    existing(either, file)
    from_here: NDArray[np.bool_] = np.array([a is b for a, b in zip(here, either, strict=True)])
    if from_here.any():
        return (
            either,
            f"{int(from_here.sum())} paths relative to the working folder, {int((~from_here).sum())} to its own",
        )
    return beside, "paths relative to its own folder"
