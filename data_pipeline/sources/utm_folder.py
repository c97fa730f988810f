"""The field's folder layout: photographs named @UTM_east@UTM_north@zone@letter@lat@lon@pano@tile@heading@...@.jpg."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.listing import PlaceListing, build_listing
from data_pipeline.sources.cells import Grid, place_of_images

_EXPECTED = "@UTM_east@UTM_north@zone@letter@lat@lon@pano@tile@heading@pitch@roll@height@timestamp@note@.jpg"
_ZONE, _LETTER, _LAT, _LON, _PANO, _HEADING, _TIME = 3, 4, 5, 6, 7, 9, 13


def read_utm_folder(
    source: Path, *, city: str = "", grid: Grid | None = None, min_images_per_place: int = 4
) -> PlaceListing:
    """The places of a folder (and its sub-folders) of photographs named in the UTM convention, by `grid`.

    The city is `city`, or the folder's name; UTM zones, if several, and the grid's groups are told apart by suffixes.
    Raises FileNotFoundError where there is no such photograph, ValueError for a name that cannot be read.
    """
    files = sorted(str(path.relative_to(source)) for path in source.rglob("*.jpg"))
    if not files:
        raise FileNotFoundError(f"{source}: no .jpg in it; expected photographs named {_EXPECTED}")
    fields = [_fields(source, file) for file in files]
    east, north = (np.array([float(f[n]) for f in fields]) for n in (1, 2))
    heading = np.array([_number(f[_HEADING]) for f in fields])
    zones = [f"{f[_ZONE]}{f[_LETTER]}" for f in fields]
    base = city or re.sub(r"[^\w-]", "-", source.resolve().name)
    zone_suffix = [f"-{zone}" if len(set(zones)) > 1 else "" for zone in zones]
    suffix, place = place_of_images(east, north, heading, grid or Grid())
    dates = [re.match(r"(\d{4})-?(\d{2})", f[_TIME]) for f in fields]
    images = pa.table(
        {
            "city": [f"{base}{a}{b}" for a, b in zip(zone_suffix, suffix, strict=True)],
            "place": place,
            "year": pa.array([int(d[1]) if d else None for d in dates], pa.int64()),
            "month": pa.array([int(d[2]) if d else None for d in dates], pa.int64()),
            "northdeg": pa.array([None if np.isnan(h) else round(h) % 360 for h in heading], pa.int64()),
            "lat": pa.array([_known(f[_LAT]) for f in fields], pa.float64()),
            "lon": pa.array([_known(f[_LON]) for f in fields], pa.float64()),
            "panoid": [f[_PANO] for f in fields],
            "file": files,
            "csv": [""] * len(files),
            "row": np.arange(len(files)),
        }
    )
    return build_listing(source, images, min_images_per_place=min_images_per_place, names_say_all=False)


def _fields(source: Path, file: str) -> list[str]:
    """The parts of a name between its @, as many as the convention has; missing ones are empty."""
    fields = Path(file).stem.split("@")
    if len(fields) < 3 or np.isnan(_number(fields[1])) or np.isnan(_number(fields[2])):
        raise ValueError(f"{source / file}: its name holds no UTM coordinates; expected {_EXPECTED}")
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
