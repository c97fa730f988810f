"""A user's own data: a CSV or Parquet table of (path, place) and whatever else is known of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

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


def read_manifest(path: Path, *, root: Path | None = None, min_images_per_place: int = 4) -> PlaceListing:
    """The places of a table with the columns path and place, and any of city, lat, lon, year, month, northdeg, panoid.

    Paths are relative to `root`, or else to the table's folder. Places are numbers, or names that are numbered in
    sorted order within their city; without a city, it is the table's name. Raises FileNotFoundError, or ValueError for
    a table that cannot be used, naming column and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a CSV or Parquet table with the columns path and place")
    table = _read(path)
    for column in _NEEDED:
        if column not in table.column_names:
            raise ValueError(f"{path}: no column {column}; found {', '.join(table.column_names)}")
    columns: dict[str, Any] = {"file": table["path"].cast(pa.string())}
    for name, kind in _OPTIONAL.items():
        if name in table.column_names:
            try:
                columns[name] = table[name].cast(kind)
            except pa.ArrowInvalid as error:
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
    columns["place"] = _numbers(columns["city"], table["place"], path)
    columns["csv"] = pa.repeat(path.name, len(table))
    columns["row"] = pa.array(np.arange(len(table)) + 2)
    return build_listing(
        root or path.parent, pa.table(columns), min_images_per_place=min_images_per_place, names_say_all=False
    )


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        text = dict.fromkeys(("path", "place", "city", "panoid"), pa.string())
        table = pa.csv.read_csv(
            path, convert_options=pa.csv.ConvertOptions(column_types=text, null_values=[""], strings_can_be_null=True)
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error
    return table


def _numbers(city: pa.Array, place: pa.ChunkedArray, path: Path) -> pa.Array:
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
    if pc.min(numbers).as_py() < 0:
        raise ValueError(f"{path}: a place is {pc.min(numbers).as_py()}; numbers count from 0")
    return numbers
