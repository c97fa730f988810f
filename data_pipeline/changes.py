"""Whether the photographs of a source are still those of its shard set."""

from __future__ import annotations

import zlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.index import ShardIndex
from data_pipeline.listing import PlaceListing
from data_pipeline.photo_source import source_of
from data_pipeline.shard_options import ShardOptions


def changed_photograph(
    listing: PlaceListing, index: ShardIndex, suspect: NDArray[np.bool_], options: ShardOptions
) -> str | None:
    """Where the first photograph lies that is not the one in the set, of the rows that are `suspect`; or None.

    Suspects are read again, and scaled again as the `options` say if the set's are, and held against the index's
    crc32; a photograph that was left out as bad must still be bad.
    """
    if not suspect.any():
        return None
    # Importing torch takes seconds, which a source that has not changed need not wait for.
    from data_pipeline.photos import fetch_photo

    bad = {image.file for image in index.metadata.bad}
    by_image = _crc32_by_image(listing, index, bad)
    source = source_of(listing.source)
    for row in np.flatnonzero(suspect).tolist():
        image = listing.images.slice(row, 1).to_pylist()[0]
        photo = fetch_photo(source, image, options)
        said = by_image.get(row)
        if isinstance(photo, str) != (image["file"] in bad):
            return source.where(image)
        if said is not None and not isinstance(photo, str) and zlib.crc32(photo.jpeg) != said:
            return source.where(image)
    return None


def _crc32_by_image(listing: PlaceListing, index: ShardIndex, bad: set[str]) -> dict[int, int]:
    """The crc32 that the index has for a row of the listing; none for what was left out."""
    good = ~np.isin(listing.images["file"].to_numpy(), list(bad))
    place = np.repeat(np.arange(listing.num_places), np.diff(listing.place_starts))
    kept_views = np.bincount(place[good], minlength=listing.num_places)
    rows = np.flatnonzero(good & (kept_views[place] >= listing.min_images_per_place))
    images = listing.images.select(["city", "place"]).append_column("at", pa.array(np.arange(listing.num_images)))
    in_order = images.take(rows).sort_by([(name, "ascending") for name in ("city", "place", "at")])["at"]
    return dict(zip(in_order.to_pylist(), index.crc32.tolist(), strict=True))
