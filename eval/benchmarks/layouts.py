"""Layouts that visual place recognition data is distributed in, each read as one benchmark."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading, shown
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError, make_benchmark
from eval.benchmarks.ground_truth import (
    FARTHEST_M,
    GroundTruthError,
    check_name,
    check_numbers,
    clip_to,
    read_array,
    read_lines,
    read_names,
    read_positives,
    within_radius,
)
from eval.benchmarks.matlab import read_db_struct

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def images_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Photographs of a folder by name; `<folder>_images_paths.txt` beside it, where there, spares the walk.

    Raises FileNotFoundError naming the folder if it holds none.
    """
    listing = folder.with_name(f"{folder.name}_images_paths.txt")
    if listing.is_file():
        names = read_lines(listing, words=False)
        paths = sorted(folder.parent / name if name.startswith(f"{folder.name}/") else folder / name for name in names)
    else:
        found = folder.rglob("*") if deep else folder.glob("*")
        paths = sorted(path for path in found if path.suffix in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES[:3])}) in {folder}")
    return paths


def existing(paths: Sequence[Path], source: Path) -> list[Path]:
    """The paths, all of which exist. Raises FileNotFoundError naming the first that does not, and how many."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} names {len(missing)} of {len(paths)} images that are not there: {missing[0]}"
        )
    return list(paths)


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
    parts = {part: images_in(folder / base / part, deep=True) for part in (database, queries)}
    database_D2, queries_Q2 = (np.array([_utm(path) for path in paths]) for paths in parts.values())
    positives = within_radius(queries_Q2, database_D2, radius_m)
    return make_benchmark(name, f"{radius_m:g} m radius, all queries", parts[database], parts[queries], positives)


def _utm(path: Path) -> tuple[float, float]:
    fields = path.name.split("@")
    try:
        return float(fields[1]), float(fields[2])
    except (IndexError, ValueError) as error:
        raise BenchmarkError(f"{path}: expected a name like @UTM_east@UTM_north@...@.jpg") from error


def vpr_bench(name: str, folder: Path, protocol: str) -> Benchmark:
    """VPR-Bench: `query/`, `ref/` and `ground_truth_new.npy`, whose numbers count images in order of name."""
    source = folder / "ground_truth_new.npy"
    database, queries = _numbered(folder / "ref"), _numbered(folder / "query")
    positives, notes = clip_to(read_positives(source), len(database), source.name)
    return make_benchmark(name, protocol, database, queries, positives, notes)


def _numbered(folder: Path) -> list[Path]:
    """Images in the order of the numbers that end their names, where all have one; by name otherwise."""
    paths = images_in(folder)
    digits = ["".join(c for c in path.stem if c.isdigit()) for path in paths]
    if not all(digits) or len(set(map(int, digits))) != len(paths):
        return paths
    return [path for _, path in sorted(zip(map(int, digits), paths, strict=True), key=lambda pair: pair[0])]


def gsv_lists(name: str, folder: Path, stem: str, protocol: str, *, unleak: bool = False) -> Benchmark:
    """gsv-cities' lists: `<stem>_dbImages.npy`, `_qImages.npy`, and `_gt.npy`, or `_qIdx.npy` with `_pIdx.npy`.

    `_qIdx` picks the queries that count. With `unleak`, database entries with a query's file name are left out.
    """
    lists = {part: folder / f"{stem}_{part}.npy" for part in ("dbImages", "qImages", "qIdx", "pIdx", "gt")}
    notes: list[str] = []
    database = [folder / image for image in read_names(lists["dbImages"])]
    queries = [folder / image for image in read_names(lists["qImages"])]
    if lists["qIdx"].is_file():
        positives, source = read_positives(lists["pIdx"]), lists["pIdx"]
        with reading(f"ground truth {lists['qIdx']}", "numbers of queries", GroundTruthError):
            chosen = read_array(lists["qIdx"]).astype(np.int64).reshape(-1)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(queries):
            raise GroundTruthError(f"{lists['qIdx']} picks query {int(chosen.max())} of {len(queries)}")
        if len(chosen) != len(queries):
            notes.append(f"{lists['qImages'].name} names {len(queries)} queries, of which {len(chosen)} count")
        queries = [queries[i] for i in chosen]
    else:
        positives, source = read_positives(lists["gt"]), lists["gt"]
    positives, clipped = clip_to(positives, len(database), source.name)
    notes += clipped
    if unleak:
        database, positives, leaks = _without_leaks(database, queries, positives)
        notes += leaks
    existing(queries, lists["qImages"])
    existing(database, lists["dbImages"])
    return make_benchmark(name, protocol, database, queries, positives, notes)


def _without_leaks(
    database: list[Path], queries: list[Path], positives: list[NDArray[np.int64]]
) -> tuple[list[Path], list[NDArray[np.int64]], list[str]]:
    names = {path.name for path in queries}
    keep = np.array([path.name not in names for path in database], dtype=bool)
    if keep.all():
        return database, positives, []
    number = np.cumsum(keep) - 1
    left = [path for path, kept in zip(database, keep, strict=True) if kept]
    note = f"the database list holds {int((~keep).sum())} of the {len(queries)} queries, which are left out of it"
    return left, [number[ids[keep[ids]]].astype(np.int64) for ids in positives], [note]


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
    positives = within_radius(utm["q"], utm["db"], radius_m)
    return make_benchmark(name, f"{radius_m:g} m radius, all queries", paths["db"], paths["q"], positives)


def _resolver(folder: Path, first: str, roots: Sequence[str], source: Path) -> Callable[[str], Path]:
    """How a listed name becomes a path: below one of the roots, with its own suffix or the one it was published in."""
    for root in roots:
        for suffix in (None, *SUFFIXES):
            path = folder / root / first
            if (path if suffix is None else path.with_suffix(suffix)).is_file():
                return lambda image: (
                    folder / root / image if suffix is None else (folder / root / image).with_suffix(suffix)
                )
    tried = ", ".join(root or "." for root in roots)
    raise FileNotFoundError(f"{source} names {first}, which is in none of {folder}/{{{tried}}}")


def same_names(name: str, folder: Path, database: str, queries: str, protocol: str) -> Benchmark:
    """Two folders in which images of one place have one name, suffixes aside (AmsterTime's `new` and `old`)."""
    parts = [{path.stem: path for path in images_in(folder / part)} for part in (database, queries)]
    if alone := sorted(parts[0].keys() ^ parts[1].keys()):
        raise BenchmarkError(
            f"benchmark {name}: {alone[0]} is in only one of {folder}/{{{database},{queries}}} "
            f"({len(alone)} such names); expected pairs"
        )
    stems = sorted(parts[0])
    positives = [np.array([i], dtype=np.int64) for i in range(len(stems))]
    return make_benchmark(name, protocol, [parts[0][s] for s in stems], [parts[1][s] for s in stems], positives)


def manifest(name: str, file: Path, radius_m: float = RADIUS_M) -> Benchmark:
    """A CSV or Parquet table with the columns `path`, `role` (database or query), and `place`, `lat` and `lon`, or
    `east` and `north` (metres).

    Paths are relative to the table. Raises BenchmarkError naming row and column.
    """
    import pandas as pd

    if not file.is_file():
        raise FileNotFoundError(f"manifest {file} does not exist")
    with reading(f"manifest {file}", "a readable table", BenchmarkError):
        if file.suffix == ".parquet":
            table = pd.read_parquet(io.BytesIO(file.read_bytes()))
        else:
            table = pd.read_csv(file, dtype={"place": str, "path": str, "role": str}, index_col=False)
        table = table.reset_index(drop=True)
        for column in {"path", "role", "place"} & set(table.columns):
            table[column] = [None if pd.isna(value) else str(value) for value in table[column]]
        twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise BenchmarkError(f"manifest {file} has the column {shown(twice[0])} twice")
    keys = next((k for k in (["east", "north"], ["lat", "lon"], ["place"]) if set(k) <= set(table.columns)), None)
    if keys is None or not {"path", "role"} <= set(table.columns):
        raise BenchmarkError(
            f"manifest {file} has the columns {shown(', '.join(map(str, table.columns)))}; expected path, role and one "
            "of place / lat, lon / east, north"
        )
    roles = table["role"].astype(str)
    wrong = table.index[~roles.isin(["database", "query"])]
    if len(wrong):
        row = int(wrong[0])
        raise BenchmarkError(f"manifest {file}, row {row + 2}: role {shown(roles[row])!r}; use database or query")
    for column in ("path", *keys):
        if column in ("path", "place"):
            bad = table[column].isna()
        else:
            with reading(f"manifest {file}", f"numbers in column {column}", BenchmarkError):
                table[column] = pd.to_numeric(table[column], errors="coerce").astype(float)
            bad = ~(table[column].abs() <= FARTHEST_M)
        if bad.any():
            row = int(table.index[bad][0])
            raise BenchmarkError(f"manifest {file}, row {row + 2}: {column} is empty or no number on a map")
    for row, text in enumerate(table["path"]):
        check_name(text, f"manifest {file}, row {row + 2}")
    table["role"] = roles
    parts = {role: table[table["role"] == role] for role in ("database", "query")}
    if any(part.empty for part in parts.values()):
        empty = next(role for role, part in parts.items() if part.empty)
        raise BenchmarkError(f"manifest {file} has no row of role {empty}")
    paths = {role: existing([file.parent / str(p) for p in part["path"]], file) for role, part in parts.items()}
    if keys == ["place"]:
        rows = dict(parts["database"].reset_index().groupby("place").groups)
        none = np.zeros(0, dtype=np.int64)
        positives = [np.asarray(rows.get(place, none), dtype=np.int64) for place in parts["query"]["place"]]
        return make_benchmark(name, "same place, all queries", paths["database"], paths["query"], positives)
    from eval.benchmarks.ground_truth import on_sphere

    at = {role: part[keys].to_numpy(dtype=np.float64) for role, part in parts.items()}
    if keys == ["lat", "lon"]:
        at = {role: on_sphere(xy[:, 0], xy[:, 1]) for role, xy in at.items()}
    positives = within_radius(at["query"], at["database"], radius_m)
    protocol = f"{radius_m:g} m radius, all queries"
    return make_benchmark(name, protocol, paths["database"], paths["query"], positives)
