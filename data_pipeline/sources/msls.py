"""Mapillary Street-Level Sequences (Warburg et al., 2020), its training folders.

[train_val/]<city>/{database,query}/postprocessed.csv    key, easting, northing, view_direction, ...
[train_val/]<city>/{database,query}/raw.csv              key, lon, lat, ca (heading), captured_at, pano
[train_val/]<city>/{database,query}/images/<key>.jpg
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from configs.reading import reading
from data_pipeline.dates import years_and_months
from data_pipeline.listing import PlaceListing, build_listing
from data_pipeline.positions import from_lat_lon, from_metres
from data_pipeline.sources.cells import Grid, place_of_images

_POSTPROCESSED = {"key": pa.string(), "easting": pa.float64(), "northing": pa.float64()}
_RAW = {
    "key": pa.string(),
    "lon": pa.float64(),
    "lat": pa.float64(),
    "ca": pa.float64(),
    "captured_at": pa.string(),
    "pano": pa.string(),
}


def read_msls(
    source: Path, *, cities: list[str] | None = None, grid: Grid | None = None, min_images_per_place: int = 4
) -> PlaceListing:
    """The places of MSLS' training folders, by `grid` over each city's own UTM coordinates and headings.

    Database and query images count alike; panoramas are left out. Raises FileNotFoundError for missing folders or
    tables, ValueError for a table that cannot be used.
    """
    root = source / "train_val" if (source / "train_val").is_dir() else source
    found = sorted(path.parent.name for path in root.glob("*/database")) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{source}: no [train_val/]<city>/database, as MSLS' training folders have")
    for city in cities or []:
        if city not in found:
            raise ValueError(f"{root}: no city {city}; there are {', '.join(found)}")
    read = [_read_city(source, root / city, grid or Grid()) for city in cities or found]
    return build_listing(
        source,
        pa.concat_tables([images for images, _ in read]),
        min_images_per_place=min_images_per_place,
        names_say_all=False,
        notes=[note for _, notes in read for note in notes],
    )


def _read_city(source: Path, folder: Path, grid: Grid) -> tuple[pa.Table, list[str]]:
    parts = [_read_part(source, folder / name) for name in ("database", "query") if (folder / name).is_dir()]
    images = pa.concat_tables(parts)
    suffix, place = place_of_images(
        images["easting"].to_numpy(),
        images["northing"].to_numpy(),
        images["ca"].to_numpy().astype(np.float64),
        grid,
    )
    year, month, odd = years_and_months(images["captured_at"].to_pylist(), f"values of captured_at in {folder.name}")
    headings = [h if h is not None and np.isfinite(h) else None for h in images["ca"].to_pylist()]
    table = pa.table(
        {
            "city": [f"{folder.name}{s}" for s in suffix],
            "place": place,
            "year": year,
            "month": month,
            "northdeg": pa.array([None if h is None else round(h) % 360 for h in headings], pa.int64()),
            "lat": images["lat"],
            "lon": images["lon"],
            "panoid": images["key"],
            "file": images["file"],
            "csv": images["csv"],
            "row": images["row"],
        }
    )
    return table, odd


def _read_part(source: Path, folder: Path) -> pa.Table:
    post, raw = (
        _read_csv(folder / name, types) for name, types in (("postprocessed.csv", _POSTPROCESSED), ("raw.csv", _RAW))
    )
    from_metres(post["easting"].to_numpy(), post["northing"].to_numpy(), folder / "postprocessed.csv")
    from_lat_lon(raw["lat"].to_numpy(), raw["lon"].to_numpy(), folder / "raw.csv", missing_ok=True)
    name = (folder / "postprocessed.csv").relative_to(source).as_posix()
    post = post.append_column("csv", pa.repeat(name, len(post)))
    post = post.append_column("row", pa.array(range(2, len(post) + 2), pa.int64()))
    both = post.join(raw, "key", join_type="inner").sort_by("row")
    if len(both) != len(post):
        raise ValueError(f"{folder}: {len(post) - len(both)} images of postprocessed.csv are not in raw.csv")
    pano = [str(value).lower() == "true" for value in both["pano"].to_pylist()]
    both = both.filter(pa.array([not value for value in pano], pa.bool_()))
    images = folder.relative_to(source).as_posix() + "/images"
    return both.append_column("file", pa.array([f"{images}/{key}.jpg" for key in both["key"].to_pylist()], pa.string()))


def _read_csv(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; MSLS' training folders have it")
    options = pa.csv.ConvertOptions(include_columns=list(types), column_types=types)
    with reading(path, f"a CSV with the columns {', '.join(types)}"):
        table = pa.csv.read_csv(path, convert_options=options)
        table.validate(full=True)  # text is UTF-8
        if table["key"].null_count:
            raise ValueError(f"{path}: a row without a key")
        return table
