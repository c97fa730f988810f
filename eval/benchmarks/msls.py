"""Mapillary Street-Level Sequences (validation cities) in Mapillary's own layout, under both protocols in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from configs.reading import reading, shown
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError, make_benchmark
from eval.benchmarks.ground_truth import check_name, check_numbers, within_radius
from eval.benchmarks.layouts import existing, gsv_lists

CITIES = ("cph", "sf")
PROTOCOL_740 = "740 cleaned queries (gsv-cities lists), 25 m and 40 degrees"
PROTOCOL_11K = "all queries but panoramas (11k), 25 m radius"


def msls_740(name: str, folder: Path) -> Benchmark:
    """The 740 queries of gsv-cities' `msls_val_{dbImages,qImages,qIdx,pIdx}.npy` over `train_val/{cph,sf}`.

    `qImages` names 747 queries, of which `qIdx` picks 740.
    """
    if (folder / "msls_val_dbImages.npy").is_file():
        return gsv_lists(name, folder, "msls_val", PROTOCOL_740)
    raise FileNotFoundError(
        f"{folder}: the 740-query protocol needs msls_val_dbImages.npy beside msls_val_qImages.npy, _qIdx.npy and "
        "_pIdx.npy (gsv-cities, datasets/msls_val); all queries: msls_val/11k"
    )


def msls_11k(name: str, folder: Path) -> Benchmark:
    """All queries of `train_val/{cph,sf}/{query,database}` but panoramas, by `postprocessed.csv` and `raw.csv`."""
    database, query = (_side(folder / "train_val", side) for side in ("database", "query"))
    positives = within_radius(query[1], database[1], RADIUS_M)
    notes = [f"{query[2] + database[2]} panoramas are left out"] if query[2] + database[2] else []
    return make_benchmark(name, PROTOCOL_11K, database[0], query[0], positives, notes)


def _side(root: Path, side: str) -> tuple[list[Path], np.ndarray, int]:
    import pandas as pd

    paths: list[Path] = []
    utm, panoramas = [], 0
    for number, city in enumerate(CITIES):
        tables = {}
        for table, columns in (("postprocessed", ["key", "easting", "northing"]), ("raw", ["key", "pano"])):
            file = root / city / side / f"{table}.csv"
            if not file.is_file():
                raise FileNotFoundError(f"MSLS table {file} does not exist")
            with reading(f"MSLS table {file}", f"a CSV with the columns {', '.join(columns)}", BenchmarkError):
                tables[table] = pd.read_csv(file, usecols=columns, dtype={"key": str, "pano": str}, index_col=False)
                _check_keys(tables[table]["key"], file)
        rows = tables["postprocessed"].merge(tables["raw"], on="key")
        if len(rows) != len(tables["postprocessed"]):
            raise BenchmarkError(f"MSLS tables of {root / city / side}: postprocessed.csv and raw.csv differ in keys")
        flat = ~rows["pano"].str.lower().eq("true")
        panoramas += int((~flat).sum())
        rows = rows[flat]
        paths += [root / city / side / "images" / f"{key}.jpg" for key in rows["key"]]
        file = root / city / side / "postprocessed.csv"
        with reading(f"MSLS table {file}", "numbers in easting and northing", BenchmarkError):
            at = check_numbers(rows[["easting", "northing"]].to_numpy(dtype=np.float64), file, "easting, northing")
        utm.append(at + np.array([1e9 * number, 0.0]))  # the two cities' zones must not meet
    return existing(paths, root), np.concatenate(utm), panoramas


def _check_keys(keys: Any, file: Path) -> None:
    """Raises BenchmarkError for a key that is missing, twice there, or that no file can be called."""
    for row in keys.index[keys.isna() | keys.duplicated()]:
        raise BenchmarkError(f"MSLS table {file} row {row + 2}: key {shown(keys[row])} is empty, or there twice")
    for row, key in enumerate(keys):
        check_name(key, f"MSLS table {file} row {row + 2}")
