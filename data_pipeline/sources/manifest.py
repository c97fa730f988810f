"""A user's own data: a CSV or Parquet table of (path, place) and whatever else is known of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from configs.reading import reading, shown
from data_pipeline.listing import PlaceListing, build_listing

_NEEDED = ("path", "place")
_OPTIONAL = {
    "city": pa.string(),
    "lat": pa.float64(),
    "lon": pa.float64(),
    "year": pa.int64(),
    "month": pa.int64(),
    "northdeg": pa.int64(),
    "panoid": pa.string(),
}
_BETWEEN = {"lat": (-90, 90), "lon": (-180, 180), "month": (1, 12), "northdeg": (0, 360), "place": (0, 10**18)}


def read_manifest(path: Path, *, root: Path | None = None, min_images_per_place: int = 4) -> PlaceListing:
    """The places of a table with the columns path and place, and any of city, lat, lon, year, month, northdeg, panoid.

    Paths are relative to `root`, or else to the table's folder. Places are numbers, or names that are numbered in
    sorted order within their city; without a city, it is the table's name. Raises FileNotFoundError, or ValueError for
    a table that cannot be used, naming column and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a CSV or Parquet table with the columns path and place")
    with reading(path, "a table of places"):
        return _listing(path, _read(path), root or path.parent, min_images_per_place)


def _listing(path: Path, table: pa.Table, root: Path, min_images_per_place: int) -> PlaceListing:
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the column {shown(twice[0])} is there twice")
    for column in _NEEDED:
        if column not in table.column_names:
            raise ValueError(f"{path}: no column {column}; found {shown(', '.join(table.column_names))}")
        kind = table.schema.field(column).type
        if pa.types.is_nested(kind):
            raise ValueError(f"{path}: column {column} is {kind}; expected text or numbers")
    if len(table) == 0:
        raise ValueError(f"{path}: no rows; expected a row an image")
    columns: dict[str, Any] = {"file": table["path"].cast(pa.string())}
    for name, kind in _OPTIONAL.items():
        if name in table.column_names:
            try:
                columns[name] = table[name].cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(f"{path}: column {name} is no {kind} ({str(error).splitlines()[0]})") from error
        else:
            columns[name] = pa.nulls(len(table), kind)
    if "city" not in table.column_names:
        columns["city"] = pa.repeat(path.stem, len(table))
    columns["panoid"] = pc.fill_null(columns["panoid"], "")
    for name, values in (("path", columns["file"]), ("place", table["place"]), ("city", columns["city"])):
        if values.null_count:
            missing = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"{path} row {missing + 2}: no {name}")
    columns["place"] = _numbers(columns["city"], table["place"])
    for name, (least, most) in _BETWEEN.items():
        _check_between(columns[name], least, most, path, name)
    columns["csv"] = pa.repeat(path.name, len(table))
    columns["row"] = pa.array(np.arange(len(table)) + 2)
    return build_listing(root, pa.table(columns), min_images_per_place=min_images_per_place, names_say_all=False)


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(pa.BufferReader(path.read_bytes()))
        text = dict.fromkeys(("path", "place", "city", "panoid"), pa.string())
        table = pa.csv.read_csv(
            path, convert_options=pa.csv.ConvertOptions(column_types=text, null_values=[""], strings_can_be_null=True)
        )
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error
    return table


def _numbers(city: pa.Array, place: pa.ChunkedArray) -> pa.Array:
    """Places as whole numbers: their own, or their ranks within the city."""
    try:
        numbers = place.cast(pa.int64())
    except pa.ArrowInvalid:
        pairs = list(zip(city.to_pylist(), place.cast(pa.string()).to_pylist(), strict=True))
        ranks: dict[str, int] = {}
        rank_of = {}
        for pair in sorted(set(pairs)):
            rank_of[pair] = ranks[pair[0]] = ranks.get(pair[0], -1) + 1
        return pa.array([rank_of[pair] for pair in pairs], pa.int64())
    return numbers


def _check_between(values: Any, least: int, most: int, path: Path, name: str) -> None:
    """Raises ValueError for the first value outside [least, most], nulls apart."""
    within = pc.fill_null(pc.and_(pc.greater_equal(values, least), pc.less_equal(values, most)), True)
    wrong = pc.index(within, pa.scalar(False)).as_py()
    if wrong >= 0:
        raise ValueError(f"{path} row {wrong + 2}: {name} is {values[wrong].as_py()}; expected {least} to {most}")
