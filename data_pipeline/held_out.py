"""Places of a shard set that training never sees, and photographs of them to find again."""

from __future__ import annotations

import csv
import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.files import partial_of, remove, remove_abandoned
from data_pipeline.index import PlaceRange
from data_pipeline.mixture import PlaceMixture
from data_pipeline.plan import Int64
from data_pipeline.storage import RangeReader

MOST_OTHERS = 1_000
TABLE = "held_out.csv"
_STREAM = 1 << 20  # of draws, beside those of a mixture's sets


@dataclass(frozen=True)
class HeldOut:
    """Photographs of held-out places as files: one view of each is a query, all others are the database.

    The database has a view of up to `MOST_OTHERS` trained places too. Places are int64, one for each file.
    """

    database: list[Path]
    queries: list[Path]
    database_places: Int64
    query_places: Int64


def draw_views(places: PlaceMixture, held_out: Int64, *, seed: int) -> tuple[Int64, Int64, Int64]:
    """Of each held-out place the view that is the query [H]; and up to MOST_OTHERS trained places with a view each.

    Nothing but the arguments enters.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
    query_H = (bits.random_raw(len(held_out)) >> np.uint64(1)).astype(np.int64) % places.num_views[held_out]
    trained = np.setdiff1d(np.arange(places.num_places), held_out)
    draws = bits.random_raw(len(trained))
    others = np.sort(trained[np.argsort(draws, kind="stable")[:MOST_OTHERS]])
    view_O = (bits.random_raw(len(others)) >> np.uint64(1)).astype(np.int64) % places.num_views[others]
    return query_H, others, view_O


def held_out_digest(held_out: Int64) -> str:
    """8 hex digits of which places are held out."""
    return hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()[:8]


def held_out_folder(output: Path, places: PlaceMixture, held_out: Int64, *, seed: int) -> Path:
    """Where the photographs lie: a name of its own for each data set, draw and seed."""
    about = f"{places.digest} {held_out_digest(held_out)} {seed}"
    return output / f"held_out-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def write_held_out(folder: Path, places: PlaceMixture, held_out: Int64, reader: RangeReader, *, seed: int) -> None:
    """Writes the photographs and TABLE (path, role, place) to `folder`, which appears whole; one that is there is kept.

    `rerankvpr eval --benchmarks manifest:FOLDER/held_out.csv` reads it. Raises ValueError for damaged bytes, what the
    reader raises, OSError.
    """
    if (folder / TABLE).is_file():
        return
    query_H, others, view_O = draw_views(places, held_out, seed=seed)
    remove_abandoned(folder)
    partial = partial_of(folder)
    rows = []
    try:
        for part in ("database", "queries"):
            (partial / part).mkdir(parents=True)
        for place, query in zip(held_out.tolist(), query_H.tolist(), strict=True):
            found = places.place_range(place)
            data = reader.read(found.location, found.start, found.length, version=found.version)
            for view in range(len(found.sizes)):
                rows.append((*_write(partial, found, data, place, view, is_query=view == query), place))
        for place, view in zip(others.tolist(), view_O.tolist(), strict=True):
            found = places.place_range(place)
            data = reader.read(found.location, found.start, found.length, version=found.version)
            rows.append((*_write(partial, found, data, place, view, is_query=False), place))
        text = io.StringIO()
        csv.writer(text).writerows([("path", "role", "place"), *rows])
        (partial / TABLE).write_text(text.getvalue())
        partial.rename(folder)
    finally:
        remove(partial)


def _write(folder: Path, found: PlaceRange, data: bytes, place: int, view: int, *, is_query: bool) -> tuple[str, str]:
    """Writes a view; its name in the folder and its role."""
    start = int(found.offsets[view])
    photograph = data[start : start + int(found.sizes[view])]
    if zlib.crc32(photograph) != found.crc32[view]:
        raise ValueError(f"{found.location}: place {place} view {view} is damaged; run `rerankvpr verify`")
    role = "query" if is_query else "database"
    name = f"{'queries' if is_query else 'database'}/{place:07d}_{view:02d}.jpg"
    (folder / name).write_bytes(photograph)
    return name, role


def read_held_out(folder: Path) -> HeldOut:
    """What `write_held_out` wrote, in its order. Raises OSError where it is not there."""
    paths: dict[str, list[Path]] = {"database": [], "query": []}
    numbers: dict[str, list[int]] = {"database": [], "query": []}
    with (folder / TABLE).open(newline="") as file:
        for row in csv.DictReader(file):
            paths[row["role"]].append(folder / row["path"])
            numbers[row["role"]].append(int(row["place"]))
    return HeldOut(
        database=paths["database"],
        queries=paths["query"],
        database_places=np.array(numbers["database"], np.int64),
        query_places=np.array(numbers["query"], np.int64),
    )
