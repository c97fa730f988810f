"""One tar of a shard set: written from its part of a listing, or taken over from an interrupted run."""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from configs.files import file_sha256, partials_of, replacing
from configs.reading import reading
from data_pipeline.index import (
    FORMAT_VERSION,
    SCHEMA,
    BadImage,
    ShardFile,
    read_table,
    write_table,
)
from data_pipeline.listing import FACTS
from data_pipeline.photo_source import PhotoSource
from data_pipeline.shard_options import ShardOptions
from data_pipeline.tars import END_OF_TAR, pack_place

if TYPE_CHECKING:
    from data_pipeline.photos import Photo

_NAMED = 3


@dataclass(frozen=True)
class BadImages:
    """How many images may be bad: a share of all of them."""

    share: float
    total: int

    def check(self, bad: Sequence[BadImage]) -> None:
        """Raises ValueError, naming the first, where there are more."""
        if len(bad) > self.share * self.total:
            first = "; ".join(map(str, bad[:_NAMED])) + ("; ..." if len(bad) > _NAMED else "")
            raise ValueError(
                f"stopped at {len(bad)} unreadable photographs of {self.total}, more than max_bad {self.share:g} "
                f"allows; repair them or allow more: {first}"
            )


@dataclass(frozen=True)
class TarJob:
    """What decides a tar: its images (a listing's rows) and how many each of its places has, in order.

    `changed_ns` is when the last of its source files changed, in nanoseconds of the file system's clock.
    """

    source: PhotoSource
    out: Path
    name: str
    images: pa.Table
    place_sizes: list[int]
    set_digest: str
    tar_digest: str
    changed_ns: int
    min_images_per_place: int
    options: ShardOptions
    allowed: BadImages

    @property
    def tar(self) -> Path:
        """Where it goes."""
        return self.out / self.name


@dataclass(frozen=True)
class TarResult:
    """A finished tar and its index rows; place ids count from 0."""

    file: ShardFile
    rows: pa.Table
    bad: list[BadImage]
    places: int
    places_lost: int
    images_lost: int
    reused: bool


def finish_tar(job: TarJob, bad_before: list[BadImage], on_images: Callable[[int], None] | None = None) -> TarResult:
    """The tar of a job: an earlier run's if it is whole, or else written; `on_images(images done)` of this tar."""
    result = _earlier(job)
    if result is None:
        result = _write(job, bad_before, on_images)
    elif on_images is not None:
        on_images(len(job.images))
    return result


def finish_tar_in_worker(job: TarJob) -> TarResult:
    """`finish_tar` in a process of a pool."""
    return finish_tar(job, [])


def end_with_parent() -> None:
    """Ends this process when the one that started it dies, so that nothing writes after a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def rows_file(tar: Path) -> Path:
    """The index rows of one finished tar, kept until all are finished."""
    return tar.with_suffix(".rows.parquet")


def unfinished(tar: Path) -> list[Path]:
    """What an interrupted run left of a tar."""
    return [*partials_of(tar), *partials_of(rows_file(tar))]


def _earlier(job: TarJob) -> TarResult | None:
    if not (job.tar.is_file() and rows_file(job.tar).is_file()) or job.changed_ns > job.tar.stat().st_mtime_ns:
        return None
    rows, said = read_table(rows_file(job.tar))
    with reading(rows_file(job.tar), "the rows of a finished tar; remove it and its tar is written again"):
        file = ShardFile(**said["file"])
        if said["shard"] != job.tar_digest or file_sha256(job.tar) != file.sha256:
            return None
        bad = [BadImage(**bad) for bad in said["bad"]]
        places, places_lost, images_lost = (int(said[key]) for key in ("places", "places_lost", "images_lost"))
    return TarResult(file, rows, bad, places, places_lost, images_lost, reused=True)


def _write(job: TarJob, bad_before: list[BadImage], on_images: Callable[[int], None] | None) -> TarResult:
    """Writes the tar and the file of its rows; the tar appears last."""
    with replacing(job.tar, durable=True) as partial:
        result, said = _write_tar(job, partial, bad_before, on_images)
        # The rows come first, so that a tar without them is known to be somebody else's.
        with replacing(rows_file(job.tar), durable=True) as rows:
            write_table(rows, result.rows, said)
    return result


def _write_tar(
    job: TarJob, tar: Path, bad_before: list[BadImage], on_images: Callable[[int], None] | None
) -> tuple[TarResult, dict[str, Any]]:
    """Writes the tar under a name of its own; what it holds, and what the file of its rows says of it."""
    # Importing torch takes seconds, which a set that is complete, or a user's mistake, need not wait for.
    from data_pipeline.photos import read_photos

    rows: list[dict[str, Any]] = []
    bad: list[BadImage] = []
    kept = places_lost = images_lost = done = 0
    digest = hashlib.sha256()
    images = job.images.to_pylist()
    with ThreadPoolExecutor(job.options.threads_per_worker, "decode") as pool, tar.open("wb") as file:
        photos = read_photos(job.source, images, pool, job.options)
        for size in job.place_sizes:
            good: list[tuple[dict[str, Any], Photo]] = []
            for image in images[done : done + size]:
                photo = next(photos)
                if isinstance(photo, str):
                    bad.append(BadImage(image["csv"], image["row"], image["file"], photo))
                    job.allowed.check(bad_before + bad)
                else:
                    good.append((image, photo))
            done += size
            if len(good) < job.min_images_per_place:
                places_lost += 1
                images_lost += len(good)
            else:
                place_rows = [_index_row(image, photo, kept, job.name) for image, photo in good]
                sources = [Path(image["file"]).name for image, _ in good]
                data = pack_place(place_rows, [photo.jpeg for _, photo in good], sources, file.tell())
                digest.update(data)
                file.write(data)
                rows += place_rows
                kept += 1
            if on_images is not None:
                on_images(done)
        digest.update(END_OF_TAR)
        file.write(END_OF_TAR)
        shard = ShardFile(job.name, file.tell(), digest.hexdigest())
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    said = {
        "format_version": FORMAT_VERSION,
        "set": job.set_digest,
        "shard": job.tar_digest,
        "file": asdict(shard),
        "bad": [asdict(image) for image in bad],
        "places": kept,
        "places_lost": places_lost,
        "images_lost": images_lost,
    }
    return TarResult(shard, table, bad, kept, places_lost, images_lost, reused=False), said


def _index_row(image: dict[str, Any], photo: Photo, place: int, shard: str) -> dict[str, Any]:
    """An index row but for what its place in the tar decides; place ids count from 0 in each shard until the end."""
    row: dict[str, Any] = {key: image[key] for key in FACTS}
    row |= {"place_id": place, "city": image["city"], "city_place_id": image["place"], "shard": shard}
    return row | {"width": photo.width, "height": photo.height}
