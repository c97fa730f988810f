"""Photographs inside tars and zips, with a table of what each shows, as GLDv2 and OSV-5M come."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from configs.reading import reading, shown
from data_pipeline.archives.chunks import chunks_of
from data_pipeline.archives.cost import Estimate, estimate, size
from data_pipeline.archives.files import Archive, find_archives
from data_pipeline.archives.found import Found, collect, write_left_out
from data_pipeline.archives.gather import Gathering, gather, remove_spill
from data_pipeline.archives.wanted import names_whole, wanted_members
from data_pipeline.index import INDEX
from data_pipeline.listing import CITY, PlaceListing
from data_pipeline.photo_source import READ_THREADS, RETRY_S, shared_reader
from data_pipeline.sources.cells import Grid
from data_pipeline.sources.manifest import list_table
from data_pipeline.storage import is_remote
from data_pipeline.tables import RowTable, read_table_of_rows

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("path", "member", "file", "filename", "id", "image_id", "key"),
    "place": ("place", "place_id", "landmark_id", "scene_id"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "longitude", "lng"),
    "east": ("east",),
    "north": ("north",),
    "year": ("year",),
    "month": ("month",),
    "northdeg": ("northdeg", "heading", "compass_angle"),
    "city": ("city",),
    "panoid": ("panoid",),
}
EXPECTED = "a CSV or Parquet table with a column of ids or members, and place, or lat and lon"
MEMBERS = "members"
NOT_USED = "-"
_BETTER = 0.8  # of the time that ranges take: spill files cost disk, and a measurement is rough
By = Literal["auto", "ranges", "sequence"]


@dataclass(frozen=True)
class Reading:
    """How archives are read: `threads` at a time over a network, `spill_bytes` held in memory for each spill file."""

    by: By = "auto"
    threads: int = READ_THREADS
    retry_s: float = RETRY_S
    spill_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.threads < 1 or self.spill_bytes < 1 or self.retry_s < 0:
            raise ValueError("read threads and spill files are 1 or more, the time of retries 0 or more seconds")


def read_tars(
    words: Sequence[str],
    table: Path,
    out: Path,
    how: Reading,
    *,
    columns: Mapping[str, str] | None = None,
    grid: Grid | None = None,
    min_images_per_place: int = 4,
    part: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
    on_progress: OnProgress = untold,
) -> PlaceListing:
    """The places of photographs that lie in archives, as the rows of a table say; see `list_table` for its columns.

    Archives are listed (and, in sequence, copied to spill files) first, under OUT/members, from where an earlier run
    stopped; `part` says where among them this run begins beside others. Of members with one name the last counts, as
    unpacking them one after the other would leave it. What is not used is counted in notes and named in
    OUT/left_out.csv. Raises FileNotFoundError, ValueError for a table or archives that cannot be used, StorageError.
    """
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file; give {EXPECTED}")
    reader = shared_reader(how.retry_s)
    archives = find_archives(words, reader)
    grid = grid or Grid(groups=1)
    with reading(table, EXPECTED):
        rows, notes = _read_table(table, columns or {})
        rows, twice = _without_repeats(rows)
        listing = list_table(rows, table.parent, grid, min_images_per_place)
    rank = np.full(len(rows), -1, dtype=np.int64)
    rank[np.searchsorted(rows.lines, listing.images["row"].to_numpy())] = np.arange(listing.num_images)
    del listing
    for note in notes:
        say(note)
    keys = rows.text("path")
    wanted = wanted_members(keys, not names_whole(keys), rank)
    folder = out / MEMBERS / wanted.digest
    is_complete = (out / INDEX).exists()

    spill, window = _choose(archives, int((rank >= 0).sum()), folder, how, say, is_complete)
    remote = any(is_remote(archive.location) for archive in archives)
    gather(
        archives,
        Gathering(
            folder=folder,
            wanted=wanted,
            reader=reader,
            spill=spill,
            spill_bytes=how.spill_bytes,
            window=window,
            threads=min(len(archives), (4 if spill else how.threads) if remote else 1),
            need_spill=not is_complete,
        ),
        first=part[0] * len(archives) // part[1] if part and 0 <= part[0] < part[1] else 0,
        on_progress=on_progress,
    )
    found = collect(archives, folder, wanted, need_spill=not is_complete)
    photos = found.photos(rows.lines, f"{table.name} in {_shown(archives)}", how.threads, how.retry_s)
    there = found.member >= 0
    if found.faults:  # what is cut off may hold any row
        there[:] = True
    if not there.any():
        raise ValueError(
            f"{table}: none of its {len(rows)} rows names a member of {_shown(archives)} (row {rows.lines[0]} names "
            f"{shown(keys[0].as_py())!r}, the first member is {shown(found.first_name)!r}); --columns image COLUMN "
            "says which column does"
        )
    with reading(table, EXPECTED):
        listing = list_table(_taken(rows, there, found), photos, grid, min_images_per_place)
    if not part and found.leaves_out(len(twice)):
        write_left_out(out, archives, folder, rows, twice, found, need_spill=not is_complete)
    notes = found.notes(len(rows), len(twice), out)
    return replace(listing, notes=(*notes, *listing.notes))


def finish(out: Path) -> None:
    """Removes the spill files of a set that is complete; the lists of members stay, for a run that comes again."""
    for folder in (out / MEMBERS).glob("*"):
        remove_spill(folder)


def _read_table(table: Path, given: Mapping[str, str]) -> tuple[RowTable, list[str]]:
    """The table with its columns under the names that `list_table` knows, and notes on them."""
    for key in given:
        if key not in COLUMNS:
            raise ValueError(f"--columns {key}: expected one of {', '.join(COLUMNS)}")
    chosen: dict[str, str] = {}

    def keep(names: list[str]) -> Collection[str]:
        for key, known in COLUMNS.items():
            if key in given:
                name = str(given[key]).strip().casefold()
                if name == NOT_USED:
                    continue
                if name not in names:
                    raise ValueError(f"{table}: no column {name}; found {shown(', '.join(names))}")
                chosen[key] = name
            else:
                chosen.update((key, name) for name in reversed(known) if name in names)
        if "image" not in chosen:
            raise ValueError(
                f"{table}: no column of ids or members ({', '.join(COLUMNS['image'])}); found "
                f"{shown(', '.join(names))}; --columns image COLUMN names it"
            )
        return set(chosen.values())

    read = read_table_of_rows(table, keep)
    notes = []
    columns = {("path" if key == "image" else key): read.columns[name] for key, name in chosen.items()}
    if "city" in columns and "city" not in given and not _are_cities(columns["city"]):
        del columns["city"], chosen["city"]
        notes.append(
            "column city is not used: it has gaps, or names of other characters than letters, digits, '_', '-'"
        )
    said = ", ".join(f"{key} {name}" for key, name in chosen.items())
    return RowTable(read.path, columns, read.lines), [f"{table.name}: {len(read):,} rows, columns {said}", *notes]


def _are_cities(values: pa.Array) -> bool:
    return values.null_count == 0 and all(
        isinstance(city, str) and CITY.fullmatch(city) for city in pc.unique(values).to_pylist()
    )


def _without_repeats(rows: RowTable) -> tuple[RowTable, list[int]]:
    """The table without rows whose image a row before has, and the lines of those."""
    keys = rows.text("path")
    if keys.null_count:
        raise ValueError(f"row {rows.lines[int(pc.index(keys.is_null(), True).as_py())]}: no id or member")
    codes = keys.dictionary_encode()
    if len(codes.dictionary) == len(keys):
        return _with_keys(rows, keys), []
    _, first = np.unique(codes.indices.to_numpy(), return_index=True)
    is_first = np.zeros(len(keys), dtype=bool)
    is_first[first] = True
    return _filtered(_with_keys(rows, keys), is_first), rows.lines[~is_first].tolist()


def _with_keys(rows: RowTable, keys: pa.Array) -> RowTable:
    plain = pc.replace_substring_regex(pc.replace_substring(keys, "\\", "/"), r"^(\./|/)+", "")
    return RowTable(rows.path, {**rows.columns, "path": plain}, rows.lines)


def _filtered(rows: RowTable, keep: NDArray[np.bool_]) -> RowTable:
    if keep.all():
        return rows
    mask = pa.array(keep)
    return RowTable(rows.path, {name: column.filter(mask) for name, column in rows.columns.items()}, rows.lines[keep])


def _choose(
    archives: Sequence[Archive], photographs: int, folder: Path, how: Reading, say: Callable[[str], None], done: bool
) -> tuple[bool, int]:
    """Whether photographs are read in sequence, and the window in which members are listed."""
    compressed = [archive for archive in archives if archive.is_compressed]
    if how.by == "ranges" and compressed:
        raise ValueError(
            f"{compressed[0].shown}: compressed as a whole, so it can be read in sequence alone; leave out --by ranges"
        )
    left = [
        archive
        for archive in archives
        if not any(chunk.is_last for chunk in chunks_of(folder, archive, need_spill=not done))
    ]
    if len(left) < len(archives):
        say(f"{len(archives) - len(left)} of {len(archives)} archives are listed by an earlier run")
    if not left:
        return False, 0
    total = sum(archive.size for archive in archives)
    head = f"{len(archives)} archive{'s' if len(archives) > 1 else ''}, {size(total)}"
    folder.mkdir(parents=True, exist_ok=True)
    remote = any(is_remote(archive.location) for archive in archives)
    found = estimate(left, photographs, shared_reader(how.retry_s), folder, how.threads if remote else 1)
    if found is None:
        say(f"{head}: read in sequence" if how.by != "ranges" else f"{head}: by ranges")
        return how.by != "ranges", 2**18
    spill = how.by == "sequence" or (
        how.by == "auto" and _fits(found, folder) and found.sequence_s < _BETTER * found.ranges_s
    )
    say(f"{head}: {found}: {'in sequence' if spill else 'by ranges'}{'' if how.by == 'auto' else ', as asked'}")
    if spill and not _fits(found, folder):
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"{folder}: {size(free)} free, spill files and shards take {size(2 * found.spilled)}; give an OUT with "
            "more space, or --by ranges, which needs no spill files"
        )
    return spill, found.window


def _fits(found: Estimate, folder: Path) -> bool:
    return shutil.disk_usage(folder).free > 2 * found.spilled


def _taken(rows: RowTable, there: NDArray[np.bool_], found: Found) -> RowTable:
    """The rows that are used, with the names of their members as paths (a missing one's is what its row says)."""
    names = found.names.take(pa.array(np.where(found.member >= 0, found.member, 0), mask=found.member < 0))
    columns = {**rows.columns, "path": pc.coalesce(names, rows.text("path"))}
    return _filtered(RowTable(rows.path, columns, rows.lines), there)


def _shown(archives: Sequence[Archive]) -> str:
    first, last = archives[0].name, archives[-1].name
    return first if len(archives) == 1 else f"{len(archives)} archives ({first} to {last})"
