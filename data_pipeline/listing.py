"""Photographs of places, as any source lists them and `shard` writes them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.photo_source import PhotoSource

# A tar header holds 100 bytes of name; WebDataset ends a sample's key at the first dot.
CITY = re.compile(r"[\w-]+")
CITY_BYTES = 64
NO_PLACE = -1

FACTS = {
    **dict.fromkeys(("year", "month", "northdeg"), pa.int64()),
    **dict.fromkeys(("lat", "lon"), pa.float64()),
    "panoid": pa.string(),
}
"""What a source may know of a photograph, and a shard set keeps."""
SCHEMA = pa.schema(
    [
        ("city", pa.string()),
        ("place", pa.int64()),
        *FACTS.items(),
        ("file", pa.string()),
        ("csv", pa.string()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class PlaceListing:
    """Places and the images of each.

    `images` has SCHEMA's columns, one row per image: city, place (the city's own number), year, month, northdeg, lat,
    lon (null where unknown), panoid, file, csv (relative to `source`; csv is empty where no table lists the images),
    row (line of the csv; the header is line 1). Place p owns rows `place_starts[p]` to `place_starts[p + 1]`, and
    places lie in (city, place) order unless shuffled. `folders` must exist in `source`. `details` is a digest of all
    that the file names do not say. `notes` are on what of the source is not used, or looks odd; `left_out`
    has the names and reasons of photographs that are no part of it.
    """

    source: Path | PhotoSource
    images: pa.Table
    place_starts: NDArray[np.int64]
    min_images_per_place: int
    places_left_out: int
    images_left_out: int
    folders: tuple[str, ...] = ()
    details: str = ""
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def num_places(self) -> int:
        """Places in all cities."""
        return len(self.place_starts) - 1

    @property
    def num_images(self) -> int:
        """Images of all places."""
        return len(self.images)

    @property
    def cities(self) -> list[str]:
        """Names of the cities, in order."""
        return sorted(pc.unique(self.images["city"]).to_pylist())


def build_listing(
    source: Path | PhotoSource,
    images: pa.Table,
    *,
    min_images_per_place: int,
    folders: Sequence[str] = (),
    names_say_all: bool = True,
    notes: Sequence[str] = (),
) -> PlaceListing:
    """The listing of `images` (any order): sorted, places with fewer than `min_images_per_place` left out and counted.

    Rows whose place is -1 belong to no place: they are left out, with a note.
    Raises ValueError where no place is left, or a city's name cannot be part of a sample's key.
    """
    if min_images_per_place < 1:
        raise ValueError(f"min_images_per_place is {min_images_per_place}; use 1 or more (GSV-Cities' own is 4)")
    images = images.select(SCHEMA.names).cast(SCHEMA)
    lost = pc.sum(pc.equal(images["place"], NO_PLACE)).as_py()
    if lost:
        images = images.filter(pc.not_equal(images["place"], NO_PLACE))
        notes = [*notes, _no_place(lost, lost + len(images))]
        if not len(images):
            raise ValueError(f"{source}: {notes[-1]}")
    for city in pc.unique(images["city"]).to_pylist():
        if not CITY.fullmatch(city) or len(city.encode()) > CITY_BYTES:
            raise ValueError(f"{source}: city {city!r}; expected at most {CITY_BYTES} letters, digits, '_' and '-'")
    images = images.sort_by([(name, "ascending") for name in ("city", "place", "csv", "row")])
    starts = _group_starts(images)
    counts = np.diff(starts)
    keep = counts >= min_images_per_place
    if not keep.any():
        raise ValueError(
            f"{source}: none of {len(counts)} places has {min_images_per_place} images (the largest has "
            f"{counts.max(initial=0)}); lower min_images_per_place"
        )
    images = images.filter(pa.array(np.repeat(keep, counts))).combine_chunks()
    return PlaceListing(
        source=source,
        images=images,
        place_starts=np.concatenate([[0], np.cumsum(counts[keep])]).astype(np.int64),
        min_images_per_place=min_images_per_place,
        places_left_out=int((~keep).sum()),
        images_left_out=int(counts[~keep].sum()),
        folders=tuple(folders),
        details="" if names_say_all else _digest(images),
        notes=tuple(notes),
    )


def _no_place(count: int, total: int) -> str:
    return (
        f"left out: {count} of {total} photographs that belong to no place (with --focal-m: that look at neither focal "
        "point of their cell; a larger --heading-deg takes in more)"
    )


def plain_city(name: str) -> str:
    """A name of a folder or file as a city's: other characters than letters, digits, '_' and '-' become '-'."""
    plain = re.sub(r"[^\w-]+", "-", name).strip("-") or "city"
    return plain.encode()[:CITY_BYTES].decode(errors="ignore")


def shuffle_places(listing: PlaceListing, seed: int) -> PlaceListing:
    """The listing with the places of each city in an order drawn from `seed`; cities keep theirs.

    Only raw 64-bit draws enter, whose stream numpy guarantees over versions.
    """
    starts = listing.place_starts
    counts = np.diff(starts)
    city = listing.images["city"].combine_chunks().dictionary_encode().indices.to_numpy()[starts[:-1]]
    draws = np.random.Philox(np.random.SeedSequence([seed])).random_raw(len(counts))
    order = np.lexsort((draws, city))
    new_starts = np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64)
    rows = np.repeat(starts[order] - new_starts[:-1], counts[order]) + np.arange(len(listing.images))
    return replace(listing, images=listing.images.take(rows).combine_chunks(), place_starts=new_starts)


def _group_starts(images: pa.Table) -> NDArray[np.int64]:
    """Where each place starts in rows sorted by (city, place), and the number of rows at the end."""
    if len(images) == 0:
        return np.zeros(1, dtype=np.int64)
    city = images["city"].combine_chunks().dictionary_encode().indices.to_numpy()
    place = images["place"].to_numpy()
    first = (np.diff(city) != 0) | (np.diff(place) != 0)
    return np.concatenate([[0], np.flatnonzero(first) + 1, [len(images)]]).astype(np.int64)


def _digest(images: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, images.schema) as stream:
        stream.write_table(images)
    return hashlib.sha256(sink.getvalue()).hexdigest()
