"""Photographs of places as a plain list of rows, for sources that need no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.listing import SCHEMA, PlaceListing, build_listing, plain_city


def list_rows(source: Path, rows: Iterable[Mapping[str, Any]], *, min_images_per_place: int) -> PlaceListing:
    """The places of rows, one per photograph: `file` (relative to `source`), `place`, and what else SCHEMA knows.

    Places are numbers, or names that are numbered in sorted order within their city; without a city, it is the
    folder's name. Raises ValueError naming the row that has no file or place, or has what no column knows.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for number, row in enumerate(rows):
        if unknown := sorted(set(row) - set(columns)):
            raise ValueError(f"{source}: row {number} has {unknown[0]!r}; known: {', '.join(columns)}")
        for name in ("file", "place"):
            if row.get(name) in (None, ""):
                raise ValueError(f"{source}: row {number} has no {name}")
        given = {"city": plain_city(source.resolve().name), "panoid": "", "csv": "", "row": number, **row}
        for name, values in columns.items():
            values.append(str(given[name]) if name == "file" else given.get(name))
    if not columns["file"]:
        raise ValueError(f"{source}: no photographs")
    if not all(isinstance(place, int) for place in columns["place"]):
        columns["place"] = _numbered(columns["city"], columns["place"])
    return build_listing(
        source,
        pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()}),
        min_images_per_place=min_images_per_place,
        names_say_all=False,
    )


def _numbered(cities: list[str], places: list[Any]) -> list[int]:
    """The rank of each place's name within its city."""
    named = sorted({(city, str(place)) for city, place in zip(cities, places, strict=True)})
    first = {city: number for number, (city, _) in reversed(list(enumerate(named)))}
    ranks = {pair: number - first[pair[0]] for number, pair in enumerate(named)}
    return [ranks[city, str(place)] for city, place in zip(cities, places, strict=True)]
