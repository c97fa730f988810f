"""Whether the photographs of a source are still those of its shard set."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.index import ShardIndex
from data_pipeline.listing import PlaceListing
from data_pipeline.shard_options import ShardOptions

_STAT_THREADS = 16


def changed_photograph(
    listing: PlaceListing, index: ShardIndex, suspect: NDArray[np.bool_], options: ShardOptions
) -> str | None:
    """The first photograph that is not the one in the set, of those of the listing's rows that are `suspect`; or None.

    Suspects are read again, and scaled again as the `options` say if the set's are, and held against the index's
    crc32; a photograph that was left out as bad must still be bad.
    """
    if not suspect.any():
        return None
    # Importing torch takes seconds, which a source that has not changed need not wait for.
    from data_pipeline.photos import read_photo

    bad = {image.file for image in index.metadata.bad}
    by_image = _crc32_by_image(listing, index, bad)
    files = listing.images["file"].to_pylist()
    for row in np.flatnonzero(suspect).tolist():
        photo = read_photo(Path(listing.source) / files[row], options)
        said = by_image.get(row)
        if isinstance(photo, str) != (files[row] in bad):
            return str(files[row])
        if said is not None and not isinstance(photo, str) and zlib.crc32(photo.jpeg) != said:
            return str(files[row])
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


def file_stats(source: Path, files: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes of each file (-1 where there is none), and when it changed last, in nanoseconds."""

    def stats(some: list[str]) -> list[tuple[int, int]]:
        return [file_stat(source / file) for file in some]

    step = -(-len(files) // (8 * _STAT_THREADS)) or 1
    with ThreadPoolExecutor(_STAT_THREADS, "stat") as pool:
        parts = pool.map(stats, [files[start : start + step] for start in range(0, len(files), step)])
        sizes, changed_ns = np.array([stat for part in parts for stat in part], dtype=np.int64).reshape(-1, 2).T
    return np.ascontiguousarray(sizes), changed_ns


def file_stat(path: Path) -> tuple[int, int]:
    """A file's bytes and its last change in nanoseconds; (-1, 0) where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return -1, 0
    return stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns)
