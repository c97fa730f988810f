"""Writing a shard set: places to tars, and their index. An interrupted run continues; a finished set is reused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.files import PARTIAL, partials_of
from configs.progress import OnProgress, untold
from data_pipeline.changes import changed_photograph
from data_pipeline.folder_lock import LOCK, PART_LOCK, FolderLock, LockedError, lock_name, refuse_others
from data_pipeline.formats import HEIC_SUFFIXES, OTHER_SUFFIXES
from data_pipeline.index import (
    FORMAT_VERSION,
    INDEX,
    INDEX_DIGEST,
    SCHEMA,
    BadImage,
    ShardFile,
    ShardSetMetadata,
    read_index,
    read_table,
    write_index,
)
from data_pipeline.listing import PlaceListing
from data_pipeline.photo_source import file_stat, source_of
from data_pipeline.photographs import counted
from data_pipeline.shard_options import DEFAULTS, ShardOptions
from data_pipeline.shared_locks import process_pool
from data_pipeline.tar_writer import (
    BadImages,
    TarJob,
    TarResult,
    end_with_parent,
    finish_tar,
    finish_tar_in_worker,
    rows_file,
    unfinished,
)

_JOBS_AHEAD = 2


@dataclass(frozen=True)
class ShardSummary:
    """What a shard set (or a part of one) holds, what was left out, and how many of its tars this run wrote."""

    folder: Path
    images: int
    places: int
    places_left_out: int
    images_left_out: int
    bad: list[BadImage]
    shards_written: int
    shards_reused: int
    part: tuple[int, int] | None = None

    @property
    def was_complete(self) -> bool:
        """Whether all of it was there before."""
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
    options: ShardOptions = DEFAULTS,
    *,
    part: tuple[int, int] | None = None,
    on_progress: OnProgress = untold,
) -> ShardSummary:
    """Writes the shard set of `listing` to the folder `out`, as `options` say.

    Every photograph is decoded once by the decoder that training uses; one that is missing, cut off or no JPEG is left
    out and named, and so is a place that keeps fewer than `listing.min_images_per_place`. If too many images are bad,
    ValueError is raised and no index written; tars finished by then, or by a run that was interrupted, are reused by
    the next. `out` may hold nothing but this set: ValueError otherwise. With `part` (i, n) only every n-th tar from the
    i-th on is written, beside other parts that may be running, and no index: a last run without `part` takes their tars
    and writes it. `on_progress(images done, images in all)` is called after each place, or each tar of other processes.
    """
    if part and not 0 <= part[0] < part[1]:
        raise ValueError(f"part is {part[0]}/{part[1]}; it counts from 0: 0/{part[1]} to {part[1] - 1}/{part[1]}")
    source = source_of(listing.source)
    for folder in listing.folders:
        if not Path(str(source), folder).is_dir():
            raise FileNotFoundError(f"{listing.source}: no folder {folder}, which the CSV's city_id names")
    files = listing.images["file"].to_pylist()

    def asked(done: int, total: int | None = None, note: str = "") -> None:  # noqa: ARG001
        on_progress(0, listing.num_images, f"lengths of {done:,} are known")

    sizes, changed_ns = source.stats(listing.images, asked)
    said = options.digest_text(FORMAT_VERSION, listing.min_images_per_place)
    set_digest = _digest("\n".join([said, *files]), *([listing.details] if listing.details else []))
    fingerprint = _digest(set_digest, sizes.tobytes())
    if (out / INDEX).exists():
        summary = _reuse_complete(out, fingerprint, listing, changed_ns, options)
        _remove_dead_lock(out)
        return summary

    allowed = BadImages(options.max_bad, listing.num_images)
    missing = listing.images.take(np.flatnonzero(sizes < 0)).to_pylist()
    allowed.check([BadImage(image["csv"], image["row"], image["file"], "missing") for image in missing])
    _check_formats(files, options)
    place_bytes = np.add.reduceat(np.maximum(sizes, 0), listing.place_starts[:-1])

    def job(number: int, start: int, stop: int) -> TarJob:
        name = f"shards/train-{number:06d}.tar"
        first, last = int(listing.place_starts[start]), int(listing.place_starts[stop])
        # A slice is sent to another process with all of the table behind it; what is taken stands alone.
        images = listing.images.slice(first, last - first).take(np.arange(last - first))
        return TarJob(
            source=source.part(images),
            out=out,
            name=name,
            images=images,
            place_sizes=np.diff(listing.place_starts[start : stop + 1]).tolist(),
            set_digest=set_digest,
            tar_digest=_digest(set_digest, f"{name} {start} {stop}", sizes[first:last].tobytes()),
            changed_ns=int(changed_ns[first:last].max()),
            min_images_per_place=listing.min_images_per_place,
            options=options,
            allowed=allowed,
        )

    plan = list(enumerate(plan_shards(place_bytes, options.shard_bytes)))
    mine = plan[part[0] :: part[1]] if part else plan
    total = sum(int(listing.place_starts[stop] - listing.place_starts[start]) for _, (start, stop) in mine)
    gathered = _Gathered(listing, allowed)
    with _folder_for(out, set_digest, part, [out / f"shards/train-{number:06d}.tar" for number, _ in mine]):
        jobs = (job(number, start, stop) for number, (start, stop) in mine)
        for result in _results(jobs, min(options.workers, len(mine)), gathered, total, on_progress):
            gathered.add(result)
        if part:
            return gathered.summary(out, gathered.metadata(fingerprint), part)
        metadata = gathered.finish(out, fingerprint)
    return gathered.summary(out, metadata)


def _check_formats(files: list[str], options: ShardOptions) -> None:
    """Raises ValueError if more than `options.max_bad` are no JPEGs by their names and nobody asked to convert them."""
    suffixes = (Path(file).suffix.lower() for file in files)
    others = Counter(suffix for suffix in suffixes if suffix in OTHER_SUFFIXES | HEIC_SUFFIXES)
    if not options.convert and others.total() > options.max_bad * len(files):
        raise ValueError(
            f"{others.total()} of {len(files)} photographs are no JPEGs ({counted(others)}); with --convert they are "
            f"written as JPEGs of --quality {options.quality}"
        )


def _results(
    jobs: Iterator[TarJob], workers: int, gathered: _Gathered, total: int, on_progress: OnProgress
) -> Iterator[TarResult]:
    """The finished tars in order, by this process or by `workers` others."""
    done = 0

    def report(images: int) -> None:
        on_progress(done + images, total)

    if workers <= 1:
        for job in jobs:
            yield finish_tar(job, gathered.bad, report)
            done += len(job.images)
        return
    pool = process_pool(workers, end_with_parent)
    waiting: deque[tuple[int, Future[TarResult]]] = deque()
    try:
        for job in jobs:
            waiting.append((len(job.images), pool.submit(finish_tar_in_worker, job)))
            if len(waiting) > _JOBS_AHEAD * workers:
                images, future = waiting.popleft()
                yield future.result()
                done += images
                report(0)
        while waiting:
            images, future = waiting.popleft()
            yield future.result()
            done += images
            report(0)
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed (out of memory?); run again with fewer workers to resume") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Gathered:
    """What the tars that are done hold."""

    listing: PlaceListing
    allowed: BadImages
    shards: list[ShardFile] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    reused: int = 0
    places: int = 0
    places_lost: int = 0
    images_lost: int = 0

    def add(self, tar: TarResult) -> None:
        """Take a tar over; ValueError where the bad images become too many."""
        self.bad += tar.bad
        self.allowed.check(self.bad)
        place_id = pa.array(tar.rows["place_id"].to_numpy() + self.places)
        self.tables.append(tar.rows.replace_schema_metadata().set_column(0, SCHEMA.field("place_id"), place_id))
        self.shards.append(tar.file)
        self.reused += tar.reused
        self.places += tar.places
        self.places_lost += tar.places_lost
        self.images_lost += tar.images_lost

    def metadata(self, fingerprint: str) -> ShardSetMetadata:
        """What the index says of the whole."""
        return ShardSetMetadata(
            images=sum(map(len, self.tables)),
            places=self.places,
            cities=len(pa.chunked_array([t["city"].combine_chunks() for t in self.tables], pa.string()).unique()),
            places_left_out=self.listing.places_left_out + self.places_lost,
            images_left_out=self.listing.images_left_out + self.images_lost,
            fingerprint=fingerprint,
            bad=self.bad,
            shards=self.shards,
        )

    def finish(self, out: Path, fingerprint: str) -> ShardSetMetadata:
        """Write the index, and remove what only an unfinished set needs."""
        if self.places == 0:
            raise ValueError(f"{self.listing.source}: no place is left once the unreadable images are left out")
        metadata = self.metadata(fingerprint)
        names = {shard.name for shard in self.shards}
        for tar in (out / "shards").glob("*.tar"):
            if f"shards/{tar.name}" not in names:
                tar.unlink()
        write_index(out, _in_place_order(pa.concat_tables(self.tables)), metadata)
        _remove_rows_files(out)
        return metadata

    def summary(self, out: Path, metadata: ShardSetMetadata, part: tuple[int, int] | None = None) -> ShardSummary:
        """What this run did."""
        return _summary(out, metadata, shards_reused=self.reused, part=part)


def _in_place_order(table: pa.Table) -> pa.Table:
    """Rows by (city, place, view) with place ids to match, however the places lie in the tars."""
    table = table.sort_by([(name, "ascending") for name in ("city", "city_place_id", "view")]).combine_chunks()
    first = table["view"].to_numpy() == 0
    return table.set_column(0, SCHEMA.field("place_id"), pa.array(np.cumsum(first) - 1, pa.int64()))


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()


def _remove_rows_files(out: Path) -> None:
    for path in (out / "shards").glob("*.rows.parquet*"):
        path.unlink(missing_ok=True)
    for path in out.glob(f"{PART_LOCK}*"):  # of parts that were killed
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _folder_for(out: Path, set_digest: str, part: tuple[int, int] | None, mine: list[Path]) -> Iterator[None]:
    """Make `out` ready for a set, or for a part of it beside others; refuse one that holds anything else.

    A run without a part holds the folder alone; parts hold it together, each its own lock.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file; give the folder that the shard set goes to")
    shards = out / "shards"
    with contextlib.ExitStack() as locks:
        if part:
            what = f"rerankvpr shard --part {part[0]}/{part[1]}"
            locks.enter_context(FolderLock(out, what, name=lock_name(part)))
        else:
            locks.enter_context(FolderLock(out, "rerankvpr shard"))
        refuse_others(out, part)
        shards.mkdir(exist_ok=True)
        try:
            for path in [*shards.glob("*.tar"), *shards.glob("*.rows.parquet")]:
                rows = rows_file(path) if path.suffix == ".tar" else path
                if not rows.is_file() or read_table(rows)[1].get("set") != set_digest:
                    raise ValueError(
                        f"{path}: of another shard set (other images or options); remove {out} or give another folder"
                    )
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                what = f"{out}: no space left on the disk; run again with more, finished tars are kept"
                raise OSError(errno.ENOSPC, what) from error
            raise
        finally:
            left = [path for tar in mine for path in unfinished(tar)] if part else [*shards.glob(f".train-*{PARTIAL}")]
            for path in [*left, *partials_of(out / INDEX), *partials_of(out / INDEX_DIGEST)]:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                shards.rmdir()


def _remove_dead_lock(out: Path) -> None:
    """Removes the lock of a run that was killed once its set was complete, if it is there and nobody holds it."""
    if (out / LOCK).exists():
        with contextlib.suppress(LockedError, OSError), FolderLock(out, "rerankvpr shard"):
            pass


def _reuse_complete(
    out: Path, fingerprint: str, listing: PlaceListing, changed_ns: NDArray[np.int64], options: ShardOptions
) -> ShardSummary:
    """The summary of the set that `out` holds, if it is the one asked for and its tars are there."""
    index = read_index(out)
    metadata = index.metadata
    if metadata.fingerprint != fingerprint:
        raise ValueError(f"{out}: holds another shard set (other images or options); remove it or give another folder")
    written_ns = (out / INDEX).stat().st_mtime_ns
    for shard in metadata.shards:
        size, _ = file_stat(out / shard.name)
        if size != shard.size:
            raise ValueError(f"{out / shard.name}: missing or not {shard.size} bytes; remove {out} and shard again")
        written_ns = min(written_ns, (out / shard.name).stat().st_mtime_ns)
    changed = changed_photograph(listing, index, changed_ns > written_ns, options)
    if changed is not None:
        raise ValueError(f"{out}: {changed} is not the photograph that was sharded; remove {out} and shard again")
    _remove_rows_files(out)
    return _summary(out, metadata, shards_reused=len(metadata.shards))


def _summary(
    out: Path, metadata: ShardSetMetadata, *, shards_reused: int, part: tuple[int, int] | None = None
) -> ShardSummary:
    return ShardSummary(
        folder=out,
        images=metadata.images,
        places=metadata.places,
        places_left_out=metadata.places_left_out,
        images_left_out=metadata.images_left_out,
        bad=metadata.bad,
        shards_written=len(metadata.shards) - shards_reused,
        shards_reused=shards_reused,
        part=part,
    )
