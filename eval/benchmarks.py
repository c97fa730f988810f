"""Benchmarks: database, queries, positives, and the protocol that a recall belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.ground_truth import as_csr

RADIUS_M = 25.0


class BenchmarkError(ValueError):
    """A benchmark that is not what its protocol says; one line naming folder or file, and what was expected."""


@dataclass(frozen=True)
class Benchmark:
    """Queries to be found in a database; query q's positives are positive_ids[offsets[q] : offsets[q + 1]].

    `notes` are the known faults of the data set that were met, and what was done about each.
    """

    name: str
    protocol: str
    database: list[Path]
    queries: list[Path]
    positive_offsets: NDArray[np.int64]
    positive_ids: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def positives(self, query: int) -> NDArray[np.int64]:
        """Database numbers that show the place of a query, ascending."""
        return self.positive_ids[self.positive_offsets[query] : self.positive_offsets[query + 1]]

    @property
    def num_without_positive(self) -> int:
        """Queries that nothing in the database shows; each counts as a miss."""
        return int((np.diff(self.positive_offsets) == 0).sum())


def load_benchmarks(specs: list[str], data_root: Path) -> list[Benchmark]:
    """The benchmarks that the specs name, from their folders under `data_root`; a spec may stand for several.

    `NAME[/OPTION...]` is an entry of the catalogue, `folder:PATH[:METRES]` any folder in the UTM convention and
    `manifest:FILE[:METRES]` a table of one's own. Raises ValueError naming the nearest known benchmark,
    FileNotFoundError naming the folder that is missing.
    """
    from eval.catalogue import CATALOGUE
    from eval.layouts import manifest, utm_folder

    found: list[Benchmark] = []
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if rest and kind in ("folder", "manifest"):
            path, radius_m = _path_and_radius(spec, rest)
            read = utm_folder if kind == "folder" else manifest
            found.append(read(path.name if kind == "folder" else path.stem, data_root / path, radius_m))
            continue
        name, *options = spec.split("/")
        if name not in CATALOGUE:
            known = [*CATALOGUE, "folder:PATH", "manifest:FILE"]
            raise ValueError(f"unknown benchmark {name!r}; {nearest(name, known)}")
        folder = data_root / name
        if not folder.is_dir():
            raise FileNotFoundError(f"benchmark {name}: no folder {name} in the data root {data_root}")
        found += CATALOGUE[name].load(folder, options)
    return [_checked(benchmark) for benchmark in found]


def _path_and_radius(spec: str, rest: str) -> tuple[Path, float]:
    path, colon, metres = rest.rpartition(":")
    if not colon:
        return Path(rest), RADIUS_M
    try:
        radius_m = float(metres)
    except ValueError:
        return Path(rest), RADIUS_M
    if not 0 < radius_m < float("inf"):
        raise ValueError(f"benchmark {spec}: the radius is {metres} m; expected a positive number")
    return Path(path), radius_m


def _checked(benchmark: Benchmark) -> Benchmark:
    """The benchmark if it can be run; a note where queries have no positive or are database images themselves."""
    if not benchmark.database or not benchmark.queries:
        empty = "queries" if benchmark.database else "database images"
        raise BenchmarkError(f"benchmark {benchmark.name}: no {empty}")
    if not len(benchmark.positive_ids):
        raise BenchmarkError(
            f"benchmark {benchmark.name}: none of {len(benchmark.queries)} queries has a positive "
            f"({benchmark.protocol}); do database and queries share a ground truth and a map zone?"
        )
    notes = list(benchmark.notes)
    if missing := benchmark.num_without_positive:
        first = benchmark.queries[int(np.argmax(np.diff(benchmark.positive_offsets) == 0))]
        notes.append(
            f"{missing} of {len(benchmark.queries)} queries have no positive and count as misses ({first.name})"
        )
    shared = set(benchmark.database) & set(benchmark.queries)
    if shared:
        notes.append(f"{len(shared)} queries are database images themselves ({min(shared).name}): each finds itself")
    return replace(benchmark, notes=tuple(notes))


def make_benchmark(
    name: str,
    protocol: str,
    database: Sequence[Path],
    queries: Sequence[Path],
    positives: Sequence[NDArray[np.int64]],
    notes: Sequence[str] = (),
) -> Benchmark:
    """A benchmark from the positives of each query. Raises BenchmarkError where they do not fit the images."""
    if len(positives) != len(queries):
        raise BenchmarkError(f"benchmark {name}: ground truth of {len(positives)} queries for {len(queries)} images")
    offsets, ids = as_csr(positives)
    if len(ids) and (int(ids.max()) >= len(database) or int(ids.min()) < 0):
        raise BenchmarkError(
            f"benchmark {name}: ground truth names database image {int(ids.max())}; there are {len(database)}"
        )
    return Benchmark(name, protocol, list(database), list(queries), offsets, ids, tuple(notes))


def nearest(name: str, names: Sequence[str]) -> str:
    """The nearest of the names, or all of them, for an error's last clause."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"nearest: {close[0]}" if close else f"known: {', '.join(names)}"
