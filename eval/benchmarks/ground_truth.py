"""Positives: published ground truth read safely, radii in metres, and their checks."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

EARTH_RADIUS_M = 6_371_008.8

_ARRAYS_ALONE = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"{package}.{module}", name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("_codecs", "encode"),  # how protocol 2 writes bytes
}


class GroundTruthError(ValueError):
    """Ground truth that cannot be read, or that does not belong to the images; one line naming the file."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS_ALONE:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def read_array(path: Path) -> NDArray[Any]:
    """A `.npy` array; arrays of objects go through an unpickler that knows arrays, lists, numbers and strings alone.

    Raises GroundTruthError naming the file where it is missing, damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:
            array: NDArray[Any] = _read_npy(file)
            return array
    except FileNotFoundError as error:
        raise GroundTruthError(f"ground truth {path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise GroundTruthError(f"ground truth {path} holds more than arrays, which is refused: {error}") from error
    except (ValueError, EOFError, TypeError, AttributeError, ImportError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else "cut off"
        raise GroundTruthError(f"ground truth {path} is no whole .npy file ({reason})") from error


def _read_npy(file: BinaryIO) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
    if read_header is None:
        raise ValueError(f"format version {version[0]}")
    shape, _, dtype = read_header(file)
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    array = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(array, np.ndarray):
        raise ValueError(f"a pickled {type(array).__name__}, not an array")
    return array.reshape(shape)


def read_positives(path: Path) -> list[NDArray[np.int64]]:
    """Database numbers of each query from VPR-Bench's rows [query, [numbers]] or gsv-cities' rows of numbers."""
    rows = read_array(path)
    if rows.ndim == 2 and rows.dtype == object:  # VPR-Bench
        numbers = [int(row[0]) for row in rows]
        if numbers != list(range(len(rows))):
            raise GroundTruthError(f"ground truth {path}: rows are not numbered 0 to {len(rows) - 1} in order")
        rows = rows[:, 1]
    try:
        return [np.unique(np.asarray(row, dtype=np.int64).ravel()) for row in rows]
    except (ValueError, TypeError) as error:
        raise GroundTruthError(f"ground truth {path}: expected lists of database numbers ({error})") from error


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


def within_radius(
    queries_QX: NDArray[np.float64], database_DX: NDArray[np.float64], radius_m: float
) -> list[NDArray[np.int64]]:
    """Database numbers at most `radius_m` metres from each query, ascending; the border counts."""
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]

    origin_X = database_DX.mean(axis=0)  # UTM northings are millions of metres: differences keep their digits
    tree = cKDTree(database_DX - origin_X)
    near = tree.query_ball_point(queries_QX - origin_X, radius_m * (1 + 1e-12) + 1e-7, return_sorted=True)
    found = []
    for query_X, ids in zip(queries_QX, near, strict=True):
        ids = np.asarray(ids, dtype=np.int64)
        found.append(ids[((database_DX[ids] - query_X) ** 2).sum(axis=1) <= radius_m**2])
    return found


def on_sphere(lat_N: NDArray[np.float64], lon_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees as points on a sphere of the Earth's mean radius, metres [N, 3]; 25 m of chord are 25 m of arc."""
    lat, lon = np.radians(lat_N), np.radians(lon_N)
    return EARTH_RADIUS_M * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


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
