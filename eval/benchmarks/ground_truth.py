"""Positives: published ground truth read safely, radii in metres, and their checks."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading, reason, shown
from eval.benchmarks.object_arrays import read_objects

MAX_NAME_BYTES = 1024
FARTHEST_M = 1e10  # from an origin: beyond any map, also of cities that are set apart by 1e9 m


class GroundTruthError(ValueError):
    """Ground truth that cannot be read, or that does not belong to the images; one line naming the file."""


def read_array(path: Path) -> NDArray[Any]:
    """A `.npy` array; arrays of objects go through an unpickler that knows arrays, lists, numbers and strings alone.

    Raises GroundTruthError naming the file where it is missing, damaged or holds anything else.
    """
    if not path.is_file():
        raise GroundTruthError(f"ground truth {path} does not exist")
    with reading(f"ground truth {path}", "a whole .npy file", GroundTruthError), path.open("rb") as file:
        try:
            array: NDArray[Any] = _read_npy(file)
        except pickle.UnpicklingError as error:
            raise GroundTruthError(
                f"ground truth {path} holds more than arrays, which is refused: {reason(error)}"
            ) from error
        return array


def read_names(path: Path) -> list[str]:
    """The file names in a `.npy` array. Raises GroundTruthError where it holds anything else, or no names of files."""
    names = read_array(path)
    with reading(f"ground truth {path}", "a list of file names", GroundTruthError):
        if names.dtype.kind == "U" and names.size:
            points = np.ascontiguousarray(names.astype(names.dtype.newbyteorder("="))).view(np.uint32)
            if points.max() > sys.maxunicode:
                raise ValueError("a character beyond Unicode")
        texts = [str(name) for name in names.ravel()]
        for number, text in enumerate(texts):
            check_name(text, f"ground truth {path}, entry {number}")
        return texts


def read_lines(path: Path, *, words: bool = True) -> list[str]:
    """The names of files in a text file: its words, or its lines. Raises GroundTruthError where it is no such list."""
    with reading(path, "a list of file names in UTF-8", GroundTruthError):
        text = path.read_text(encoding="utf-8")
        names = text.split() if words else [line.strip() for line in text.splitlines() if line.strip()]
        for number, name in enumerate(names):
            check_name(name, f"{path}, name {number}")
        return names


def check_name(name: str, where: str) -> None:
    """Raises GroundTruthError, saying `where`, for a text that no file can be called."""
    if not name or "\0" in name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise GroundTruthError(f"{where}: {shown(name)!r} cannot be the name of a file")


def _read_npy(file: BinaryIO) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
    if read_header is None:
        raise ValueError(f"format version {version[0]}")
    shape, _, dtype = read_header(file)
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    return read_objects(file).reshape(shape)


def read_positives(path: Path) -> list[NDArray[np.int64]]:
    """Database numbers of each query from VPR-Bench's rows [query, [numbers]] or gsv-cities' rows of numbers."""
    rows = read_array(path)
    with reading(f"ground truth {path}", "lists of database numbers", GroundTruthError):
        if rows.ndim == 2 and rows.dtype == object:  # VPR-Bench
            numbers = [int(row[0]) for row in rows]
            if numbers != list(range(len(rows))):
                raise GroundTruthError(f"ground truth {path}: rows are not numbered 0 to {len(rows) - 1} in order")
            rows = rows[:, 1]
        return [np.unique(np.asarray(row, dtype=np.int64).ravel()) for row in rows]


def check_numbers(values: NDArray[np.float64], source: Path, what: str) -> NDArray[np.float64]:
    """Positions [N, 2], all finite. Raises GroundTruthError naming file and row (from 0) of the first that is not."""
    if values.ndim != 2 or values.shape[1] != 2:
        raise GroundTruthError(f"ground truth {source}: {what} has shape {values.shape}; expected two numbers a row")
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise GroundTruthError(
            f"ground truth {source}: {what}, row {wrong[0]}: {values[wrong[0]].tolist()} is no position"
        )
    return values


def clip_to(
    positives: Sequence[NDArray[np.int64]], num_database: int, source: str
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Positives without the numbers that no database image has, and a note on what was left out."""
    kept = [ids[(ids >= 0) & (ids < num_database)] for ids in positives]
    faulty = [q for q, (old, new) in enumerate(zip(positives, kept, strict=True)) if len(old) != len(new)]
    if not faulty:
        return kept, []
    worst = max(int(ids.max(initial=-1)) for ids in positives)
    what = f"up to {worst}" if worst >= num_database else "below 0"
    queries = "query" if len(faulty) == 1 else "queries"
    return kept, [
        f"{source} names database images {what} for {len(faulty)} {queries} (first: {faulty[0]}); "
        f"the database has {num_database}, those numbers are left out"
    ]


def frames_within(num_queries: int, num_database: int, tolerance: int, step: int = 1) -> list[NDArray[np.int64]]:
    """Positives of aligned sequences: query i shows database frames i * step +- tolerance."""
    return [
        np.arange(max(0, i * step - tolerance), min(num_database, i * step + tolerance + 1), dtype=np.int64)
        for i in range(num_queries)
    ]


def as_csr(positives: Iterable[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets [Q + 1] and ids: query q's are ids[offsets[q] : offsets[q + 1]]."""
    rows = list(positives)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in rows])]).astype(np.int64)
    ids = np.concatenate(rows).astype(np.int64) if rows else np.zeros(0, dtype=np.int64)
    return offsets, ids
