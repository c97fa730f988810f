"""A benchmark: database, queries, positives, and the protocol that a recall belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.ground_truth import as_csr

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
