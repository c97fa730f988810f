"""Layouts that visual place recognition data is distributed in, each read as one benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading
from data_pipeline.positions import from_metres
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError, Whereabouts, make_benchmark
from eval.benchmarks.ground_truth import (
    FARTHEST_M,
    GroundTruthError,
    check_name,
    check_numbers,
    clip_to,
    read_lines,
    read_positives,
)
from eval.benchmarks.matlab import read_db_struct
from eval.benchmarks.photographs import Photographs, existing, images_in
from eval.benchmarks.places import by_radius, of_utm_names

# In which a published list says .jpg and the images are something else.
LISTED_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def utm_folder(
    name: str,
    folder: Path,
    radius_m: float = RADIUS_M,
    *,
    base: str = "images/test",
    database: str = "database",
    queries: str = "queries",
) -> Benchmark:
    """The field's folder convention: `images/test/{database,queries}/@UTM_east@UTM_north@...@.jpg`.

    Positives lie within `radius_m` metres; a query without one counts as a miss (VPR-methods-evaluation).
    """
    found = [images_in(folder / base / part, deep=True) for part in (database, queries)]
    notes = [note for part in found for note in part.notes]
    at, odd = of_utm_names(found[0].paths, found[1].paths)
    return by_radius(name, found[0].paths, found[1].paths, at, radius_m, [*notes, *odd])


def vpr_bench(name: str, folder: Path, protocol: str, *, database: str = "ref", queries: str = "query") -> Benchmark:
    """VPR-Bench: `query/`, `ref/` and `ground_truth_new.npy`, whose numbers count images in order of name."""
    source = folder / "ground_truth_new.npy"
    found = [_numbered(folder / part) for part in (database, queries)]
    positives, notes = clip_to(read_positives(source), len(found[0].paths), source.name)
    notes += [note for part in found for note in part.notes]
    return make_benchmark(name, protocol, found[0].paths, found[1].paths, positives, notes)


def _numbered(folder: Path) -> Photographs:
    """Images in the order of the numbers that end their names, where all have one; by name otherwise."""
    found = images_in(folder)
    digits = ["".join(c for c in path.stem if c.isdigit()) for path in found.paths]
    if not all(digits) or len(set(map(int, digits))) != len(found.paths):
        return found
    order = sorted(zip(map(int, digits), found.paths, strict=True), key=lambda pair: pair[0])
    return replace(found, paths=[path for _, path in order])


def netvlad_mat(name: str, folder: Path, stem: str) -> Benchmark:
    """NetVLAD's `datasets/<stem>.mat` (dbStruct: image names and UTM metres [2, N]) beside the images."""
    source = folder / "datasets" / f"{stem}.mat"
    table = read_db_struct(source)
    return _placed(name, folder, source, table.names, table.utm, table.radius_m or RADIUS_M)


def patch_netvlad(name: str, folder: Path, stem: str) -> Benchmark:
    """Patch-NetVLAD's `<stem>.npz` (utmQ, utmDb, posDistThr) with its two lists of image names."""
    source = folder / f"{stem}.npz"
    if not source.is_file():
        raise FileNotFoundError(f"ground truth {source} does not exist")
    with (
        reading(f"ground truth {source}", "an .npz file with utmQ, utmDb and posDistThr", GroundTruthError),
        np.load(source, allow_pickle=False) as table,
    ):
        utm = {"db": table["utmDb"].astype(float), "q": table["utmQ"].astype(float)}
        radius_m = float(table["posDistThr"])
    base = stem.removesuffix("_test")
    lists = {"db": folder / f"{base}_imageNames_index.txt", "q": folder / f"{base}_imageNames_query.txt"}
    for listing in lists.values():
        if not listing.is_file():
            raise FileNotFoundError(f"{source} needs the list of image names {listing.name} beside it")
    names = {part: read_lines(listing) for part, listing in lists.items()}
    return _placed(name, folder, source, names, utm, radius_m)


_ROOTS = {
    "db": ("", "images", "tokyo247", "database", "ref", "database_gsv_vga"),
    "q": ("", "queries_real", "query", "queries", "247query_v3", "247query_subset_v2"),
}


def _placed(
    name: str,
    folder: Path,
    source: Path,
    names: dict[str, list[str]],
    utm: dict[str, NDArray[np.float64]],
    radius_m: float,
) -> Benchmark:
    paths = {}
    if not 0 < radius_m <= FARTHEST_M:
        raise GroundTruthError(f"ground truth {source}: posDistThr is {radius_m} m; expected a positive number")
    for part, listed in names.items():
        check_numbers(utm[part], source, f"positions ({part})")
        if not listed:
            raise GroundTruthError(f"ground truth {source}: no image names ({part})")
        for number, image in enumerate(listed):
            check_name(image, f"ground truth {source}, image {number} ({part})")
        if len(listed) != len(utm[part]):
            raise GroundTruthError(f"{source}: {len(listed)} image names, {len(utm[part])} positions ({part})")
        resolve = _resolver(folder, listed[0], _ROOTS[part], source)
        paths[part] = existing([resolve(image) for image in listed], source)
    at = Whereabouts(*(from_metres(utm[part][:, 0], utm[part][:, 1], source) for part in ("db", "q")))
    return by_radius(name, paths["db"], paths["q"], at, radius_m)


def _resolver(folder: Path, first: str, roots: Sequence[str], source: Path) -> Callable[[str], Path]:
    """How a listed name becomes a path: below one of the roots, with its own suffix or the one it was published in."""
    for root in roots:
        for suffix in (None, *LISTED_SUFFIXES):
            path = folder / root / first
            if (path if suffix is None else path.with_suffix(suffix)).is_file():
                return lambda image: (
                    folder / root / image if suffix is None else (folder / root / image).with_suffix(suffix)
                )
    tried = ", ".join(root or "." for root in roots)
    raise FileNotFoundError(f"{source} names {first}, which is in none of {folder}/{{{tried}}}")


def same_names(name: str, folder: Path, database: str, queries: str, protocol: str) -> Benchmark:
    """Two folders in which images of one place have one name, suffixes aside (AmsterTime's `new` and `old`)."""
    found = [images_in(folder / part) for part in (database, queries)]
    parts = [{path.stem: path for path in part.paths} for part in found]
    if alone := sorted(parts[0].keys() ^ parts[1].keys()):
        raise BenchmarkError(
            f"benchmark {name}: {alone[0]} is in only one of {folder}/{{{database},{queries}}} "
            f"({len(alone)} such names); expected pairs"
        )
    stems = sorted(parts[0])
    positives = [np.array([i], dtype=np.int64) for i in range(len(stems))]
    notes = [note for part in found for note in part.notes]
    return make_benchmark(name, protocol, [parts[0][s] for s in stems], [parts[1][s] for s in stems], positives, notes)
