"""Writing a shard set: places to tars, and their index. An interrupted run continues; a finished set is reused."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.gsv_cities import PlaceListing
from data_pipeline.index import (
    FORMAT_VERSION,
    INDEX,
    SCHEMA,
    BadImage,
    ShardFile,
    ShardSetMetadata,
    file_sha256,
    read_index,
    read_table,
    sync,
    write_index,
    write_table,
)
from data_pipeline.tars import END_OF_TAR, pack_place

if TYPE_CHECKING:
    from data_pipeline.photos import Photo

SHARD_BYTES = 256 * 2**20
_COPIED = ("year", "month", "northdeg", "panoid")
_NAMED = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ShardSummary:
    """What a shard set holds, what was left out, and how many of its tars this run wrote."""

    folder: Path
    images: int
    places: int
    places_left_out: int
    images_left_out: int
    bad: list[BadImage]
    shards_written: int
    shards_reused: int

    @property
    def was_complete(self) -> bool:
        """Whether the whole set was there before."""
        return self.shards_written == 0


def plan_shards(place_bytes: NDArray[np.int64], shard_bytes: int) -> list[tuple[int, int]]:
    """Consecutive place ranges [start, stop), as long as fit `shard_bytes`; a larger place has a shard of its own."""
    ends = np.cumsum(place_bytes)
    plan = []
    start = filled = 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, filled + shard_bytes, side="right")))
        plan.append((start, stop))
        start, filled = stop, int(ends[stop - 1])
    return plan


def write_shards(
    listing: PlaceListing,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    max_bad: float = 0.001,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> ShardSummary:
    """Write the shard set of `listing` to the folder `out`, with about `shard_bytes` of photographs in a tar.

    Every photograph is decoded once by the decoder that training uses; one that is missing, cut off or no JPEG is left
    out and named, and so is a place that keeps fewer than `listing.min_images_per_place`. If more than the share
    `max_bad` of all images is bad, ValueError is raised and no index written; tars finished by then, or by a run that
    was interrupted, are reused by the next. `out` may hold nothing but this set: ValueError otherwise.
    `on_progress(images done, images in all)` is called after each place.
    """
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; it is a share of all images, 0 to 1")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; use 1 or more (default {SHARD_BYTES})")
    for city in listing.cities:
        if not (listing.source / "Images" / city).is_dir():
            raise FileNotFoundError(f"{listing.source}: no folder Images/{city}, which the CSV's city_id names")
    files = listing.images["file"].to_pylist()
    sizes = np.array([_file_size(listing.source / file) for file in files], dtype=np.int64)
    options = f"{FORMAT_VERSION} {shard_bytes} {listing.min_images_per_place}"
    set_digest = _digest("\n".join([options, *files]))
    fingerprint = _digest(set_digest, sizes.tobytes())
    if (out / INDEX).exists():
        return _reuse_complete(out, fingerprint)

    missing = listing.images.take(np.flatnonzero(sizes < 0)).to_pylist()
    _check_bad([_bad_image(image, "missing") for image in missing], listing.num_images, max_bad)
    place_bytes = np.add.reduceat(np.maximum(sizes, 0), listing.place_starts[:-1])
    with _folder_for(out, set_digest), ThreadPoolExecutor(threads or os.cpu_count(), "decode") as pool:
        run = _Run(listing, sizes, out, set_digest, max_bad, pool, on_progress)
        for number, (start, stop) in enumerate(plan_shards(place_bytes, shard_bytes)):
            name = f"shards/train-{number:06d}.tar"
            if not run.reuse(name, start, stop):
                run.write(name, start, stop)
        metadata = run.finish(fingerprint)
    return _summary(out, metadata, shards_reused=run.reused)


@dataclass
class _Run:
    """One `write_shards` at work, and what the tars that are done hold."""

    listing: PlaceListing
    sizes: NDArray[np.int64]
    out: Path
    set_digest: str
    max_bad: float
    pool: ThreadPoolExecutor
    on_progress: Progress | None
    shards: list[ShardFile] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    reused: int = 0
    places: int = 0
    places_lost: int = 0
    images_lost: int = 0

    def reuse(self, name: str, start: int, stop: int) -> bool:
        """Take over the tar of places [start, stop), if an earlier run finished just that."""
        tar = self.out / name
        if not (tar.is_file() and _rows_file(tar).is_file()):
            return False
        table, said = read_table(_rows_file(tar))
        file = ShardFile(**said["file"])
        if said["shard"] != self._shard_digest(name, start, stop) or file_sha256(tar) != file.sha256:
            return False
        for bad in said["bad"]:
            self._add_bad(BadImage(**bad))
        self._add_shard(file, table, said["places"], said["places_lost"], said["images_lost"])
        self.reused += 1
        self._report(stop)
        return True

    def write(self, name: str, start: int, stop: int) -> None:
        """Write the tar of places [start, stop) and the file of its rows, both under temporary names at first."""
        # Importing torchvision takes seconds, which a set that is complete, or a user's mistake, need not wait for.
        from data_pipeline.photos import read_photos

        tar = self.out / name
        temporary = tar.with_name(f"{tar.name}.tmp")
        rows: list[dict[str, Any]] = []
        bad_before, kept, places_lost, images_lost = len(self.bad), 0, 0, 0
        digest = hashlib.sha256()
        first, last = int(self.listing.place_starts[start]), int(self.listing.place_starts[stop])
        images = self.listing.images.slice(first, last - first).to_pylist()
        photos = read_photos([self.listing.source / image["file"] for image in images], self.pool)
        with temporary.open("wb") as file:
            for place in range(start, stop):
                views = slice(*(int(self.listing.place_starts[p]) - first for p in (place, place + 1)))
                good: list[tuple[dict[str, Any], Photo]] = []
                for image in images[views]:
                    photo = next(photos)
                    if isinstance(photo, str):
                        self._add_bad(_bad_image(image, photo))
                    else:
                        good.append((image, photo))
                if len(good) < self.listing.min_images_per_place:
                    places_lost += 1
                    images_lost += len(good)
                else:
                    place_rows = [_index_row(image, photo, kept, name) for image, photo in good]
                    sources = [Path(image["file"]).name for image, _ in good]
                    data = pack_place(place_rows, [photo.jpeg for _, photo in good], sources, file.tell())
                    digest.update(data)
                    file.write(data)
                    rows += place_rows
                    kept += 1
                self._report(place + 1)
            digest.update(END_OF_TAR)
            file.write(END_OF_TAR)
            shard = ShardFile(name, file.tell(), digest.hexdigest())
        sync(temporary)
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        said = {
            "format_version": FORMAT_VERSION,
            "set": self.set_digest,
            "shard": self._shard_digest(name, start, stop),
            "file": asdict(shard),
            "bad": [asdict(bad) for bad in self.bad[bad_before:]],
            "places": kept,
            "places_lost": places_lost,
            "images_lost": images_lost,
        }
        # The rows come first, so that a tar without them is known to be somebody else's.
        rows_temporary = tar.with_name(f"{_rows_file(tar).name}.tmp")
        write_table(rows_temporary, table, said)
        rows_temporary.replace(_rows_file(tar))
        temporary.replace(tar)
        sync(tar.parent)
        self._add_shard(shard, table, kept, places_lost, images_lost)

    def finish(self, fingerprint: str) -> ShardSetMetadata:
        """Write the index, and remove what only an unfinished set needs."""
        if self.places == 0:
            raise ValueError(f"{self.listing.source}: no place is left once the unreadable images are left out")
        table = pa.concat_tables(self.tables)
        metadata = ShardSetMetadata(
            images=len(table),
            places=self.places,
            cities=len(table["city"].unique()),
            places_left_out=self.listing.places_left_out + self.places_lost,
            images_left_out=self.listing.images_left_out + self.images_lost,
            fingerprint=fingerprint,
            bad=self.bad,
            shards=self.shards,
        )
        names = {shard.name for shard in self.shards}
        for tar in (self.out / "shards").glob("*.tar"):
            if f"shards/{tar.name}" not in names:
                tar.unlink()
        write_index(self.out, table, metadata)
        _remove_rows_files(self.out)
        return metadata

    def _shard_digest(self, name: str, start: int, stop: int) -> str:
        rows = slice(self.listing.place_starts[start], self.listing.place_starts[stop])
        return _digest(self.set_digest, f"{name} {start} {stop}", self.sizes[rows].tobytes())

    def _add_bad(self, image: BadImage) -> None:
        self.bad.append(image)
        _check_bad(self.bad, self.listing.num_images, self.max_bad)

    def _add_shard(self, file: ShardFile, table: pa.Table, places: int, places_lost: int, images_lost: int) -> None:
        place_id = pa.array(table["place_id"].to_numpy() + self.places)
        self.tables.append(table.replace_schema_metadata().set_column(0, SCHEMA.field("place_id"), place_id))
        self.shards.append(file)
        self.places += places
        self.places_lost += places_lost
        self.images_lost += images_lost

    def _report(self, places_done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(int(self.listing.place_starts[places_done]), self.listing.num_images)


def _index_row(image: dict[str, Any], photo: Photo, place: int, shard: str) -> dict[str, Any]:
    """An index row but for what its place in the tar decides; place ids count from 0 in each shard until the end."""
    row: dict[str, Any] = {key: image[key] for key in _COPIED}
    row |= {"place_id": place, "city": image["city"], "city_place_id": image["place"], "shard": shard}
    row |= {"width": photo.width, "height": photo.height}
    return row | {"lat": float(image["lat"]), "lon": float(image["lon"])}


def _check_bad(bad: list[BadImage], total: int, max_bad: float) -> None:
    if len(bad) > max_bad * total:
        first = "; ".join(map(str, bad[:_NAMED])) + ("; ..." if len(bad) > _NAMED else "")
        raise ValueError(
            f"stopped at {len(bad)} unreadable photographs of {total}, more than max_bad {max_bad:g} allows; "
            f"repair them or allow more: {first}"
        )


def _bad_image(image: dict[str, Any], reason: str) -> BadImage:
    return BadImage(image["csv"], image["row"], image["file"], reason)


def _file_size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()


def _rows_file(tar: Path) -> Path:
    """The index rows of one finished tar, kept until all are finished."""
    return tar.with_suffix(".rows.parquet")


def _remove_rows_files(out: Path) -> None:
    for path in (out / "shards").glob("*.rows.parquet*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _folder_for(out: Path, set_digest: str) -> Iterator[None]:
    """Make `out` ready for a set, held by this process alone; refuse one that holds anything else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file; give the folder that the shard set goes to")
    created = not out.exists()
    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(f"{out}: another process is writing shards there; wait for it") from error
    try:
        for path in [*shards.glob("*.tar"), *shards.glob("*.rows.parquet")]:
            rows = _rows_file(path) if path.suffix == ".tar" else path
            if not rows.is_file() or read_table(rows)[1].get("set") != set_digest:
                raise ValueError(
                    f"{path}: of another shard set (other images or options); remove {out} or give another folder"
                )
        yield
    finally:
        for path in [*shards.glob("train-*.tmp"), *out.glob(f"{INDEX}*.tmp")]:
            path.unlink()
        for folder in (shards, out) if created else (shards,):
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(lock)


def _reuse_complete(out: Path, fingerprint: str) -> ShardSummary:
    """The summary of the set that `out` holds, if it is the one asked for and its tars are there."""
    metadata = read_index(out).metadata
    if metadata.fingerprint != fingerprint:
        raise ValueError(f"{out}: holds another shard set (other images or options); remove it or give another folder")
    for shard in metadata.shards:
        if _file_size(out / shard.name) != shard.size:
            raise ValueError(f"{out / shard.name}: missing or not {shard.size} bytes; remove {out} and shard again")
    _remove_rows_files(out)
    return _summary(out, metadata, shards_reused=len(metadata.shards))


def _summary(out: Path, metadata: ShardSetMetadata, *, shards_reused: int) -> ShardSummary:
    return ShardSummary(
        folder=out,
        images=metadata.images,
        places=metadata.places,
        places_left_out=metadata.places_left_out,
        images_left_out=metadata.images_left_out,
        bad=metadata.bad,
        shards_written=len(metadata.shards) - shards_reused,
        shards_reused=shards_reused,
    )
