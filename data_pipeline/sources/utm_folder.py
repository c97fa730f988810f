"""The field's folder layout: photographs named @UTM_east@UTM_north@zone@letter@lat@lon@pano@tile@heading@...@.jpg."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.dates import years_and_months
from data_pipeline.listing import PlaceListing, build_listing, plain_city
from data_pipeline.photographs import list_photographs
from data_pipeline.positions import from_utm_names
from data_pipeline.sources.cells import Grid, place_of_images, plane

_EXPECTED = "@UTM_east@UTM_north@zone@letter@lat@lon@pano@tile@heading@pitch@roll@height@timestamp@note@.jpg"
_LAT, _LON, _PANO, _HEADING, _TIME = 5, 6, 7, 9, 13


def read_utm_folder(
    source: Path, *, city: str = "", grid: Grid | None = None, min_images_per_place: int = 4
) -> PlaceListing:
    """The places of a folder (and its sub-folders) of photographs named in the UTM convention, by `grid`.

    The city is `city`, or the folder's name; UTM zones far apart and the grid's groups get suffixes.
    Raises FileNotFoundError where there is no photograph, ValueError for a name that cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; expected photographs named {_EXPECTED}")
    found = list_photographs(source)
    files = found.names
    if not files:
        raise FileNotFoundError(
            f"{source}: no photograph in it; expected some named {_EXPECTED} {found.note()}".strip()
        )
    positions = from_utm_names([source / file for file in files])
    fields = [_fields(file) for file in files]
    heading = np.array([_number(f[_HEADING]) for f in fields])
    base = city or plain_city(source.resolve().name)
    east, north, zone_suffix = plane(positions)
    suffix, place = place_of_images(east, north, heading, grid or Grid())
    year, month, odd = years_and_months([f[_TIME] for f in fields], "timestamps")
    images = pa.table(
        {
            "city": [f"{base}{a}{b}" for a, b in zip(zone_suffix, suffix, strict=True)],
            "place": place,
            "year": year,
            "month": month,
            "northdeg": pa.array([None if np.isnan(h) else round(h) % 360 for h in heading], pa.int64()),
            "lat": pa.array([_known(f[_LAT]) for f in fields], pa.float64()),
            "lon": pa.array([_known(f[_LON]) for f in fields], pa.float64()),
            "panoid": [f[_PANO] for f in fields],
            "file": files,
            "csv": [""] * len(files),
            "row": np.arange(len(files)),
        }
    )
    notes = [note for note in (found.note(), *positions.notes, *odd) if note]
    return build_listing(source, images, min_images_per_place=min_images_per_place, names_say_all=False, notes=notes)


def _fields(file: str) -> list[str]:
    """The parts of a name between its @, as many as the convention has; missing ones are empty."""
    fields = Path(file).stem.split("@")
    return fields + [""] * (_TIME + 1 - len(fields))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")


def _known(text: str) -> float | None:
    value = _number(text)
    return None if np.isnan(value) else value
