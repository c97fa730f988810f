"""Folders of small photographs in the layouts of benchmarks, and what is read of them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.load import load_benchmarks

_JPEG = io.BytesIO()
Image.new("RGB", (20, 14), "teal").save(_JPEG, "JPEG")


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_JPEG.getvalue())
    return path


def photos(folder: Path, names: list[str]) -> list[Path]:
    return [photo(folder / name) for name in names]


def empty_files(folder: Path, names: Iterable[str]) -> None:
    """Files of names, with their folders; of a hundred thousand in a second, as real lists hold them."""
    made: set[str] = set()
    for name in dict.fromkeys(names):
        if (parent := name.rpartition("/")[0]) not in made:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            made.add(parent)
        os.mknod(f"{folder}/{name}")


def rows(*lists: list[int]) -> np.ndarray:
    array = np.empty(len(lists), dtype=object)
    array[:] = [np.array(ids) for ids in lists]
    return array


def vpr_rows(*lists: list[int]) -> np.ndarray:
    array = np.empty((len(lists), 2), dtype=object)
    for i, ids in enumerate(lists):
        array[i, 0], array[i, 1] = i, ids
    return array


def load(spec: str, root: Path) -> Benchmark:
    (benchmark,) = load_benchmarks([spec], root)
    return benchmark


def positives(benchmark: Benchmark) -> list[list[int]]:
    return [benchmark.positives(q).tolist() for q in range(len(benchmark.queries))]


def write_utm(
    folder: Path,
    database: list[tuple[float, float]],
    queries: list[tuple[float, float]],
    parts: tuple[str, str] = ("database", "queries"),
) -> None:
    for part, points in zip(parts, (database, queries), strict=True):
        for i, (east, north) in enumerate(points):
            photo(folder / part / f"@{east:.2f}@{north:.2f}@10@S@@@{i}@@@@@@@@.jpg")
