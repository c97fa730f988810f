"""GSV-Cities' native layout: a CSV of images a city, and the photographs they name."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from configs.reading import read_regular, reason, shown
from data_pipeline.listing import CITY, CITY_BYTES, PlaceListing, build_listing
from data_pipeline.positions import from_lat_lon

COLUMNS = ("place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid")

_INTEGER = r"^[0-9]{1,18}$"
_DEGREES = r"^-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
_PATTERNS = {
    "place_id": (_INTEGER, "a whole number"),
    "year": (r"^[0-9]{1,4}$", "a year"),
    "month": (r"^[0-9]{1,2}$", "a month, 1 to 12"),
    "northdeg": (r"^[0-9]{1,9}$", "a whole number of degrees"),
    "lat": (_DEGREES, "degrees"),
    "lon": (_DEGREES, "degrees"),
    "panoid": (r"^[^/\\\x00]+$", "a name without slashes"),
}


def read_gsv_cities(source: Path, *, min_images_per_place: int = 4, cities: list[str] | None = None) -> PlaceListing:
    """The places of the data set at `source`, from its CSVs alone: no photograph is opened or looked for.

    A row's image is Images/<city>/<city>_<place:07d>_<year:04d>_<month:02d>_<northdeg:03d>_<lat>_<lon>_<panoid>.jpg,
    where city is its city_id, and lat and lon are as the CSV writes them. Places with fewer than
    `min_images_per_place` images are left out and counted; `cities` keeps only those city_ids. Raises
    FileNotFoundError for a missing folder, ValueError for a CSV that cannot be used, naming file, row and column.
    """
    if min_images_per_place < 1:
        raise ValueError(f"min_images_per_place is {min_images_per_place}; use 1 or more (GSV-Cities' own is 4)")
    folder = source / "Dataframes"
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no folder Dataframes; GSV-Cities' layout is Dataframes/<City>.csv, Images/")
    paths = sorted(path for path in folder.glob("*.csv") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{folder}: no CSV; GSV-Cities' layout has one Dataframes/<City>.csv for each city")
    images = pa.concat_tables([_read_csv(path, f"Dataframes/{path.name}") for path in paths])
    if cities is not None:
        known = sorted(pc.unique(images["city"]).to_pylist())
        for city in cities:
            if city not in known:
                raise ValueError(f"{folder}: no city {city}; there are {', '.join(known)}")
        images = images.filter(pc.is_in(images["city"], pa.array(cities, pa.string())))
    folders = [f"Images/{city}" for city in sorted(pc.unique(images["city"]).to_pylist())]
    return build_listing(source, images, min_images_per_place=min_images_per_place, folders=folders)


def _read_csv(path: Path, name: str) -> pa.Table:
    data = read_regular(path)
    lines = data.splitlines()
    if not lines:
        raise ValueError(f"{path}: empty; expected a CSV with the columns {', '.join(COLUMNS)}")
    header = next(csv.reader([lines[0].decode("utf-8-sig", errors="replace")]), [])
    for column in COLUMNS:
        if column not in header:
            raise ValueError(
                f"{path}: no column {column}; expected {', '.join(COLUMNS)}; found {shown(', '.join(header))}"
            )
    try:
        table = pa.csv.read_csv(
            io.BytesIO(data),
            read_options=pa.csv.ReadOptions(use_threads=False),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(COLUMNS), column_types=dict.fromkeys(COLUMNS, pa.string())
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable CSV ({reason(error)})") from error
    # Blank lines are no rows, and are counted so that a row's number is its line in the file.
    rows = [number for number, line in enumerate(lines, 1) if line][1:]
    if not rows:
        raise ValueError(f"{path}: a header without rows; expected one row per image")
    if len(rows) != len(table):
        raise ValueError(f"{path}: {len(rows)} lines hold {len(table)} rows; expected one line a row")
    for column, (pattern, expected) in _PATTERNS.items():
        _check(table[column], pc.match_substring_regex(table[column], pattern), rows, path, column, expected)
    for city in pc.unique(table["city_id"]).to_pylist():
        if not CITY.fullmatch(city) or len(city.encode()) > CITY_BYTES:
            expected = f"at most {CITY_BYTES} letters, digits, '_' and '-' (no dot: a sample's key ends at the first)"
            _check(table["city_id"], pc.not_equal(table["city_id"], city), rows, path, "city_id", expected)

    numbers = {column: table[column].cast(pa.int64()) for column in ("place_id", "year", "month", "northdeg")}
    _check(table["month"], pc.is_in(numbers["month"], pa.array(range(1, 13))), rows, path, "month", "1 to 12")
    degrees = [table[name].cast(pa.float64()).to_numpy() for name in ("lat", "lon")]
    from_lat_lon(degrees[0], degrees[1], path, lines=rows)
    widths = {"place_id": 7, "year": 4, "month": 2, "northdeg": 3}
    padded = [
        pc.utf8_lpad(numbers[column].cast(pa.string()), width=width, padding="0") for column, width in widths.items()
    ]
    city = table["city_id"]
    stem = pc.binary_join_element_wise(city, *padded, table["lat"], table["lon"], table["panoid"], "_")
    return pa.table(
        {
            "city": city,
            "place": numbers["place_id"],
            "year": numbers["year"],
            "month": numbers["month"],
            "northdeg": numbers["northdeg"],
            "lat": degrees[0],
            "lon": degrees[1],
            "panoid": table["panoid"],
            "file": pc.binary_join_element_wise("Images/", city, "/", stem, ".jpg", ""),
            "csv": pa.repeat(name, len(table)),
            "row": pa.array(rows, pa.int64()),
        }
    )


def _check(
    values: pa.ChunkedArray, valid: pa.ChunkedArray, rows: list[int], path: Path, column: str, expected: str
) -> None:
    """Raises ValueError for the first value that is not valid."""
    wrong = pc.index(valid, pa.scalar(False)).as_py()
    if wrong >= 0:
        raise ValueError(f"{path} row {rows[wrong]}: {column} is {shown(values[wrong].as_py())!r}; expected {expected}")
