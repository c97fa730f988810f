"""A shard set at a glance: counts, a contact sheet, a map."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from configs.files import replacing
from data_pipeline.decoders import decode_rgb
from data_pipeline.index import ShardIndex
from data_pipeline.storage import RangeReader

_CELL = 120
_LABEL = 14
_PANELS = 12
_DOTS = 20_000


@dataclass(frozen=True)
class CityOverview:
    """A city's counts; years is "2008-2022", or "-" where none is known."""

    name: str
    places: int
    images: int
    years: str


@dataclass(frozen=True)
class Overview:
    """A set's counts. Of each triple: the least, the median and the most of all images or places."""

    cities: list[CityOverview]
    places: int
    images: int
    images_per_place: tuple[int, float, int]
    widths: tuple[int, float, int]
    heights: tuple[int, float, int]
    image_bytes: tuple[int, float, int]
    shards: int
    shard_bytes: int


def overview(index: ShardIndex) -> Overview:
    """Counts of a shard set, from its index alone."""
    table, first = index.table, index.place_starts[:-1]
    city = np.repeat(index.place_city, index.num_views)
    years = table["year"]
    cities = []
    for number, name in enumerate(index.cities):
        known = pc.min_max(years.filter(city == number)).as_py()
        span = "-" if known["min"] is None else f"{known['min']}-{known['max']}"
        cities.append(CityOverview(name, int((index.place_city == number).sum()), int((city == number).sum()), span))
    return Overview(
        cities=cities,
        places=len(first),
        images=len(table),
        images_per_place=_spread(index.num_views),
        widths=_spread(table["width"].to_numpy()),
        heights=_spread(table["height"].to_numpy()),
        image_bytes=_spread(index.size),
        shards=len(index.metadata.shards),
        shard_bytes=sum(shard.size for shard in index.metadata.shards),
    )


def draw_contact_sheet(
    index: ShardIndex, reader: RangeReader, path: Path, *, places: int = 12, views: int = 8, seed: int = 0
) -> None:
    """A PNG with a row for each of `places` places drawn by `seed`: its first `views` views, cropped to squares.

    A view whose bytes are damaged is a crossed-out square.
    """
    drawn = np.sort(np.random.default_rng(seed).choice(index.num_places, min(places, index.num_places), replace=False))
    sheet = Image.new("RGB", (views * _CELL, len(drawn) * (_CELL + _LABEL)), "white")
    ink = ImageDraw.Draw(sheet)
    number_in_city = index.table["city_place_id"]
    for row, place in enumerate(drawn.tolist()):
        top = row * (_CELL + _LABEL)
        where = index.place_range(place)
        name = index.cities[int(index.place_city[place])]
        number = number_in_city[int(index.place_starts[place])].as_py()
        ink.text((2, top + 1), f"place {place}: {name} {number}, {len(where.sizes)} views", fill="black")
        data = reader.read(where.location, where.start, where.length, version=where.version)
        for view in range(min(views, len(where.sizes))):
            corner = (view * _CELL, top + _LABEL)
            jpeg = data[where.offsets[view] : where.offsets[view] + where.sizes[view]]
            thumbnail = _thumbnail(jpeg) if zlib.crc32(jpeg) == where.crc32[view] else None
            if thumbnail:
                sheet.paste(thumbnail, corner)
            else:
                ink.line([*corner, corner[0] + _CELL, corner[1] + _CELL], fill="red", width=3)
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def draw_map(index: ShardIndex, path: Path) -> bool:
    """A PNG of where the places lie, a panel for each of the largest cities; False where none is known."""
    table, first = index.table, index.place_starts[:-1]
    lat, lon = (table[name].take(first).to_numpy(zero_copy_only=False).astype(np.float64) for name in ("lat", "lon"))
    known = np.isfinite(lat) & np.isfinite(lon)
    counts = np.bincount(index.place_city[known], minlength=len(index.cities))
    largest = [int(city) for city in np.argsort(-counts, kind="stable")[:_PANELS] if counts[city]]
    if not largest:
        return False
    columns = min(4, len(largest))
    rows = -(-len(largest) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel, city in zip(panels, largest, strict=False):
        of_city = np.flatnonzero(known & (index.place_city == city))[:: 1 + int(counts[city]) // _DOTS]
        panel.scatter(lon[of_city], lat[of_city], s=3, linewidths=0)
        panel.set_title(f"{index.cities[city]}: {counts[city]:,} places", fontsize="medium")
        panel.set_aspect(1 / max(0.1, float(np.cos(np.radians(np.median(lat[of_city]))))), adjustable="datalim")
        panel.ticklabel_format(useOffset=False)
        panel.tick_params(labelsize="x-small")
        panel.locator_params(axis="x", nbins=4)
    for panel in panels[len(largest) :]:
        panel.set_axis_off()
    figure.supxlabel("longitude, degrees")
    figure.supylabel("latitude, degrees")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return True


def _thumbnail(jpeg: bytes) -> Image.Image | None:
    """The middle of a photograph; None if it cannot be decoded."""
    try:
        pixels_3HW = decode_rgb(jpeg)
    except ValueError:
        return None
    image = Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((_CELL, _CELL), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _spread(values: NDArray[np.int64]) -> tuple[int, float, int]:
    return int(values.min()), float(np.median(values)), int(values.max())
