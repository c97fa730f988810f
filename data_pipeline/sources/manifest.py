"""Data of one's own: a CSV or Parquet table of (path, place) or (path, lat, lon), and what else is known of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.reading import reading, shown
from data_pipeline.listing import PlaceListing, build_listing, plain_city
from data_pipeline.photo_source import PhotoSource
from data_pipeline.positions import Positions, from_lat_lon, from_metres
from data_pipeline.remote_source import Bucket
from data_pipeline.sources.cells import Grid, place_of_images, plane
from data_pipeline.tables import RowTable, read_table_of_rows

EXPECTED = "a CSV or Parquet table with the columns path and place, or path, lat and lon"
_BETWEEN = {"year": (0, 9999), "month": (1, 12), "place": (0, 10**18)}


def read_manifest(
    path: Path,
    *,
    root: Path | PhotoSource | None = None,
    grid: Grid | None = None,
    min_images_per_place: int = 4,
    bucket: Bucket | None = None,
) -> PlaceListing:
    """The places of a table with the columns path and place, and any of city, lat, lon, year, month, northdeg, panoid.

    Paths are relative to `root`, or else to the table's folder; without a `root` they may be URLs, which `bucket`
    reads. Places are numbers, or names that are numbered in
    sorted order within their city; without a city, it is the table's name. A table without places has lat and lon, or
    east and north in metres (with their UTM zone in zone), from which `grid` makes places; rows without a position are
    then left out and counted.
    Raises FileNotFoundError, or ValueError for a table that cannot be used, naming column and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give {EXPECTED}")
    with reading(path, EXPECTED):
        table = read_table_of_rows(path)
        return list_table(
            table, root or _urls(table, bucket) or path.parent, grid or Grid(groups=1), min_images_per_place
        )


def _urls(table: RowTable, bucket: Bucket | None) -> Bucket | None:
    """What reads the table's paths if they are URLs. Raises ValueError if only some are."""
    table.require(["path"])
    remote = pc.fill_null(pc.match_substring(table.text("path"), "://"), False)
    if not pc.any(remote).as_py():
        return None
    if (other := pc.index(remote, pa.scalar(False)).as_py()) >= 0:
        path = shown(table.text("path")[other].as_py())
        raise ValueError(
            f"{table.path} row {table.lines[other]}: path is {path!r}; other rows have URLs: expected one there"
        )
    return bucket or Bucket()


def list_table(table: RowTable, root: Path | PhotoSource, grid: Grid, min_images_per_place: int) -> PlaceListing:
    """The places of a table whose column path names files of `root`; see `read_manifest`. Raises ValueError."""
    both, in_metres = ({*pair} <= table.columns.keys() for pair in (("lat", "lon"), ("east", "north")))
    table.require(["path"] if both or in_metres else ["path", "place"])
    _refuse_half(table)
    files, notes = _plain_paths(table, root)
    columns: dict[str, Any] = {
        "file": files,
        "panoid": pc.fill_null(_text_or_nulls(table, "panoid"), ""),
        "csv": pa.repeat(table.path.name, len(table)),
        "row": pa.array(table.lines),
    }
    positions = _metres(table) if in_metres and "place" not in table.columns else _positions(table)
    for name in ("lat", "lon"):
        degrees = table.numbers(name) if both else getattr(positions, name)
        columns[name] = pa.array(degrees, pa.float64(), from_pandas=True)
    for name in ("year", "month"):
        columns[name] = _whole(table, name)
        _check_between(columns[name], name, table)
    heading = table.numbers("northdeg") if "northdeg" in table.columns else np.full(len(table), np.nan)
    columns["northdeg"] = pa.array(np.round(heading) % 360, from_pandas=True).cast(pa.int64())
    if "city" in table.columns:
        columns["city"] = _no_gaps(table.text("city"), "city", table)
    else:
        columns["city"] = pa.array([plain_city(table.path.stem)] * len(table), pa.string())
    if "place" in table.columns:
        if grid.focal_m:
            raise ValueError(f"{table.path}: --focal-m makes places of positions, but the table has a column place")
        columns["place"] = numbers_of_places(columns["city"], _no_gaps(table.columns["place"], "place", table))
        _check_between(columns["place"], "place", table)
        images = pa.table(columns)
    else:
        images, left_out = _in_cells(pa.table(columns), positions, heading, grid)
        notes += left_out
    return build_listing(
        root,
        images,
        min_images_per_place=min_images_per_place,
        names_say_all=False,
        notes=[*notes, *positions.notes],
    )


def _in_cells(
    images: pa.Table, positions: Positions, heading: NDArray[np.float64], grid: Grid
) -> tuple[pa.Table, list[str]]:
    """The images with a position, with the place of each, and a note on the others."""
    known = positions.known
    if not known.any():
        raise ValueError("no row has a position; expected numbers in lat and lon, or a column place")
    images = images.filter(pa.array(known))
    east, north, zone_suffix = (np.asarray(part)[known] for part in plane(positions))
    suffix, place = place_of_images(east, north, heading[known], grid)
    city = [f"{a}{b}{c}" for a, b, c in zip(images["city"].to_pylist(), zone_suffix, suffix, strict=True)]
    images = images.set_column(images.schema.get_field_index("city"), "city", pa.array(city))
    missing = int((~known).sum())
    notes = [f"left out: {missing} rows without a position"] if missing else []
    return images.append_column("place", pa.array(place)), notes


def _refuse_half(table: RowTable) -> None:
    """Raises ValueError for a latitude without a longitude, or an easting without a northing."""
    for one, other in (("lat", "lon"), ("east", "north")):
        if (one in table.columns) != (other in table.columns):
            there, missing = (one, other) if one in table.columns else (other, one)
            raise ValueError(f"{table.path}: a column {there}, but no {missing}; a position is both")


def _positions(table: RowTable) -> Positions:
    nowhere = np.full(len(table), np.nan)
    lat, lon = (table.numbers(name) if name in table.columns else nowhere for name in ("lat", "lon"))
    return from_lat_lon(lat, lon, table.path, lines=table.lines.tolist(), missing_ok=True)


def _metres(table: RowTable) -> Positions:
    east, north = table.numbers("east"), table.numbers("north")
    zones = [text or "" for text in table.text("zone").to_pylist()] if "zone" in table.columns else None
    return from_metres(east, north, table.path, zones=zones, lines=table.lines.tolist(), missing_ok=True)


def _plain_paths(table: RowTable, root: Path | PhotoSource) -> tuple[pa.Array, list[str]]:
    """The column path; backslashes are slashes where that is what the files are called."""
    paths = _no_gaps(table.text("path"), "path", table)
    has = pc.match_substring(paths, "\\")
    first = pc.index(has, pa.scalar(True)).as_py()
    if first < 0 or (isinstance(root, Path) and (root / paths[first].as_py()).is_file()):
        return paths, []
    return pc.replace_substring(paths, "\\", "/"), [f"{pc.sum(has).as_py()} paths have backslashes, read as slashes"]


def _text_or_nulls(table: RowTable, name: str) -> pa.Array:
    return table.text(name) if name in table.columns else pa.nulls(len(table), pa.string())


def _no_gaps(values: pa.Array, name: str, table: RowTable) -> pa.Array:
    if pa.types.is_nested(values.type):
        raise ValueError(f"{table.path}: column {name} is {values.type}; expected text or numbers")
    if values.null_count:
        missing = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{table.path} row {table.lines[missing]}: no {name}")
    return values


def _whole(table: RowTable, name: str) -> pa.Array:
    if name not in table.columns:
        return pa.nulls(len(table), pa.int64())
    numbers = table.numbers(name)
    wrong = np.flatnonzero(~np.isnan(numbers) & (numbers != np.round(numbers)))
    if len(wrong):
        raise ValueError(
            f"{table.path} row {table.lines[wrong[0]]}: {name} is {numbers[wrong[0]]}; expected a whole number"
        )
    return pa.array(numbers, from_pandas=True).cast(pa.int64())


def numbers_of_places(city: pa.Array, place: pa.Array) -> pa.Array:
    """Places as whole numbers: their own, or the ranks of their names within the city."""
    with contextlib.suppress(pa.ArrowInvalid):
        return place.cast(pa.int64())
    names, cities = place.cast(pa.string()).dictionary_encode(), city.dictionary_encode()
    rank = np.empty(len(names.dictionary), dtype=np.int64)
    rank[pc.sort_indices(names.dictionary).to_numpy()] = np.arange(len(rank))
    pairs = cities.indices.to_numpy().astype(np.int64) * len(rank) + rank[names.indices.to_numpy()]
    known, of = np.unique(pairs, return_inverse=True)
    starts = np.flatnonzero(np.diff(known // len(rank), prepend=-1))
    number = np.arange(len(known)) - np.repeat(starts, np.diff([*starts, len(known)]))
    return pa.array(number[of.reshape(-1)])


def _check_between(values: pa.Array, name: str, table: RowTable) -> None:
    """Raises ValueError for the first value outside its bounds, nulls apart."""
    least, most = _BETWEEN[name]
    within = pc.fill_null(pc.and_(pc.greater_equal(values, least), pc.less_equal(values, most)), True)
    wrong = pc.index(within, pa.scalar(False)).as_py()
    if wrong >= 0:
        value = shown(values[wrong].as_py())
        raise ValueError(f"{table.path} row {table.lines[wrong]}: {name} is {value}; expected {least} to {most}")
