"""Mapillary Street-Level Sequences (validation cities) in Mapillary's own layout, under both protocols in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.reading import reading, shown
from data_pipeline.positions import Positions, from_metres
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError, Whereabouts, without_labels
from eval.benchmarks.ground_truth import check_name, check_numbers
from eval.benchmarks.lists import OPENVPRLAB_MSLS, gsv_lists
from eval.benchmarks.photographs import existing
from eval.benchmarks.places import by_radius, joined

CITIES = ("cph", "sf")
TEST_CITIES = ("miami", "athens", "buenosaires", "stockholm", "bengaluru", "kampala")
PROTOCOL_740 = "740 cleaned queries (gsv-cities lists), 25 m and 40 degrees"
PROTOCOL_11K = "all queries but panoramas (11k), 25 m radius"


def msls_740(name: str, folder: Path) -> Benchmark:
    """The 740 queries of gsv-cities' `msls_val_{dbImages,qImages,qIdx,pIdx}.npy` over `train_val/{cph,sf}`.

    `qImages` names 747 queries, of which `qIdx` picks 740.
    """
    if (folder / "msls_val_dbImages.npy").is_file():
        return as_msls(gsv_lists(name, folder, "msls_val", PROTOCOL_740))
    raise FileNotFoundError(
        f"{folder}: the 740-query protocol needs msls_val_dbImages.npy beside msls_val_qImages.npy, _qIdx.npy and "
        "_pIdx.npy (gsv-cities, datasets/msls_val); all queries: msls_val/11k"
    )


def msls_openvprlab(name: str, folder: Path) -> Benchmark:
    """The same 740 queries as OpenVPRLab's `msls-val` has them: `cph/`, `sf/` and its own three lists."""
    return as_msls(gsv_lists(name, folder, "msls_val", PROTOCOL_740, parts=OPENVPRLAB_MSLS))


def msls_11k(name: str, folder: Path) -> Benchmark:
    """All queries of `train_val/{cph,sf}/{query,database}` but panoramas, by `postprocessed.csv` and `raw.csv`."""
    return msls_tables(name, [folder / "train_val" / city for city in CITIES], PROTOCOL_11K)


def msls_tables(name: str, cities: Sequence[Path], protocol: str = "", radius_m: float = RADIUS_M) -> Benchmark:
    """All queries of some cities' folders but panoramas, by `postprocessed.csv` and `raw.csv`."""
    database, query = (_side(cities, side) for side in ("database", "query"))
    panoramas = query[2] + database[2]
    notes = [f"{panoramas} panoramas are left out"] if panoramas else []
    benchmark = by_radius(name, database[0], query[0], Whereabouts(database[1], query[1]), radius_m, notes)
    return as_msls(replace(benchmark, protocol=protocol) if protocol else benchmark)


def msls_test(name: str, folder: Path, cities: Sequence[str] = TEST_CITIES) -> Benchmark:
    """The test cities, whose positions are kept back: predictions for the contest's server.

    Images and their order are those of `test/<city>/{database,query}/seq_info.csv`, of which `subtask_index.csv` picks
    those of the subtask "all" (github.com/mapillary/mapillary_sls, datasets/msls.py).
    """
    sides = {
        side: [_images_of_test(folder / "test" / city / side) for city in cities] for side in ("database", "query")
    }
    database, queries = ([path for city in sides[side] for path in city] for side in ("database", "query"))
    return as_msls(without_labels(name, database, queries))


def msls_test_lists(name: str, folder: Path) -> Benchmark:
    """The same by SALAD's lists `msls_test_{dbImages,qImages}.npy`."""
    return as_msls(gsv_lists(name, folder, "msls_test", "", truth=False))


def as_msls(benchmark: Benchmark) -> Benchmark:
    """The benchmark as one whose predictions the contest's server and Mapillary's scripts read."""
    return replace(benchmark, submission="msls")


def _images_of_test(folder: Path) -> list[Path]:
    keys = _table(folder / "seq_info.csv", ["key"])["key"]
    chosen = _table(folder / "subtask_index.csv", ["all"])["all"]
    if len(keys) != len(chosen):
        raise BenchmarkError(
            f"MSLS tables of {folder}: seq_info.csv has {len(keys)} rows, subtask_index.csv {len(chosen)}"
        )
    _check_keys(keys, folder / "seq_info.csv")
    picked = keys[chosen.str.lower().isin(["true", "1", "1.0"])]
    return existing([folder / "images" / f"{key}.jpg" for key in picked], folder / "seq_info.csv")


def _table(file: Path, columns: list[str]) -> Any:
    """The columns of a CSV file, as texts but for numbers of metres."""
    import pandas as pd

    if not file.is_file():
        raise FileNotFoundError(f"MSLS table {file} does not exist")
    texts = dict.fromkeys(("key", "pano", "all"), str)
    with reading(f"MSLS table {file}", f"a CSV with the columns {', '.join(columns)}", BenchmarkError):
        return pd.read_csv(file, usecols=columns, dtype=texts, index_col=False)


def _side(cities: Sequence[Path], side: str) -> tuple[list[Path], Positions, int]:
    paths: list[Path] = []
    utm, panoramas = [], 0
    for number, city in enumerate(cities):
        tables = {}
        for table, columns in (("postprocessed", ["key", "easting", "northing"]), ("raw", ["key", "pano"])):
            file = city / side / f"{table}.csv"
            tables[table] = _table(file, columns)
            with reading(f"MSLS table {file}", "keys", BenchmarkError):
                _check_keys(tables[table]["key"], file)
        rows = tables["postprocessed"].merge(tables["raw"], on="key")
        if len(rows) != len(tables["postprocessed"]):
            raise BenchmarkError(f"MSLS tables of {city / side}: postprocessed.csv and raw.csv differ in keys")
        flat = ~rows["pano"].str.lower().eq("true")
        panoramas += int((~flat).sum())
        rows = rows[flat]
        paths += [city / side / "images" / f"{key}.jpg" for key in rows["key"]]
        file = city / side / "postprocessed.csv"
        with reading(f"MSLS table {file}", "numbers in easting and northing", BenchmarkError):
            at = check_numbers(rows[["easting", "northing"]].to_numpy(dtype=np.float64), file, "easting, northing")
        utm.append(from_metres(at[:, 0], at[:, 1], file, zone=-number))  # a map of its own: cities' zones must not meet
    return existing(paths, cities[0].parent), joined(utm), panoramas


def _check_keys(keys: Any, file: Path) -> None:
    """Raises BenchmarkError for a key that is missing, twice there, or that no file can be called."""
    for row in keys.index[keys.isna() | keys.duplicated()]:
        raise BenchmarkError(f"MSLS table {file} row {row + 2}: key {shown(keys[row])} is empty, or there twice")
    for row, key in enumerate(keys):
        check_name(key, f"MSLS table {file} row {row + 2}")
