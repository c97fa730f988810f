"""Ground truth as lists of images and numbers in .npy files: those of gsv-cities and of OpenVPRLab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading
from eval.benchmarks.benchmark import Benchmark, make_benchmark, without_labels
from eval.benchmarks.ground_truth import GroundTruthError, clip_to, read_array, read_names, read_positives
from eval.benchmarks.photographs import existing

GSV_CITIES = {part: part for part in ("dbImages", "qImages", "qIdx", "pIdx", "gt")}
# OpenVPRLab's names of the same lists: those of its msls-val, and of its pitts30k-val.
OPENVPRLAB_MSLS = GSV_CITIES | {"dbImages": "ref_image_names", "qImages": "query_image_names", "gt": "ground_truth_25m"}
OPENVPRLAB_PITTS = GSV_CITIES | {"gt": "gt_25m"}


def gsv_lists(
    name: str,
    folder: Path,
    stem: str,
    protocol: str,
    *,
    unleak: bool = False,
    parts: Mapping[str, str] = GSV_CITIES,
    truth: bool = True,
) -> Benchmark:
    """gsv-cities' lists: `<stem>_dbImages.npy`, `_qImages.npy`, and `_gt.npy`, or `_qIdx.npy` with `_pIdx.npy`.

    `_qIdx` picks the queries that count. With `unleak`, database entries with a query's file name are left out. `parts`
    are what the files are called; without `truth` there are but the lists of images.
    """
    lists = {part: folder / f"{stem}_{called}.npy" for part, called in parts.items()}
    notes: list[str] = []
    database = [folder / image for image in read_names(lists["dbImages"])]
    queries = [folder / image for image in read_names(lists["qImages"])]
    if not truth:
        existing(queries, lists["qImages"])
        return without_labels(name, existing(database, lists["dbImages"]), queries)
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
