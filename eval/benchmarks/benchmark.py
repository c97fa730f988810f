"""A benchmark: database, queries, positives, and the protocol that a recall belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.positions import Positions
from eval.benchmarks.ground_truth import as_csr

RADIUS_M = 25.0
NO_LABELS = "no ground truth: predictions without recall"


class BenchmarkError(ValueError):
    """A benchmark that is not what its protocol says; one line naming folder or file, and what was expected."""


@dataclass(frozen=True)
class Whereabouts:
    """Positions of a benchmark's images, NaN where they are unknown."""

    database: Positions
    queries: Positions


@dataclass(frozen=True)
class Benchmark:
    """Queries to be found in a database; query q's positives are positive_ids[offsets[q] : offsets[q + 1]].

    `notes` are the known faults of the data set that were met, and what was done about each; `layout` is what was read
    of the folder. `labelled_Q` marks the queries that have ground truth; None: all of them. `at` is where the images
    are, if that is known, and `submission` the format of a contest that takes predictions.
    """

    name: str
    protocol: str
    database: list[Path]
    queries: list[Path]
    positive_offsets: NDArray[np.int64]
    positive_ids: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    layout: str = ""
    labelled_Q: NDArray[np.bool_] | None = None
    at: Whereabouts | None = None
    submission: Literal["", "msls"] = ""

    def positives(self, query: int) -> NDArray[np.int64]:
        """Database numbers that show the place of a query, ascending."""
        return self.positive_ids[self.positive_offsets[query] : self.positive_offsets[query + 1]]

    @property
    def is_labelled_Q(self) -> NDArray[np.bool_]:
        """Which queries have ground truth, an answer for each."""
        return np.ones(len(self.queries), dtype=bool) if self.labelled_Q is None else self.labelled_Q

    @property
    def num_labelled(self) -> int:
        """Queries with ground truth: those that a recall counts."""
        return int(self.is_labelled_Q.sum())

    @property
    def without_positive_Q(self) -> NDArray[np.bool_]:
        """Queries that have ground truth, and nothing in the database shows them."""
        return (np.diff(self.positive_offsets) == 0) & self.is_labelled_Q

    @property
    def num_without_positive(self) -> int:
        """Queries that nothing in the database shows; each counts as a miss."""
        return int(self.without_positive_Q.sum())


def make_benchmark(
    name: str,
    protocol: str,
    database: Sequence[Path],
    queries: Sequence[Path],
    positives: Sequence[NDArray[np.int64]],
    notes: Sequence[str] = (),
    *,
    labelled_Q: NDArray[np.bool_] | None = None,
    at: Whereabouts | None = None,
) -> Benchmark:
    """A benchmark from the positives of each query. Raises BenchmarkError where they do not fit the images."""
    if len(positives) != len(queries):
        raise BenchmarkError(f"benchmark {name}: ground truth of {len(positives)} queries for {len(queries)} images")
    offsets, ids = as_csr(positives)
    if len(ids) and (int(ids.max()) >= len(database) or int(ids.min()) < 0):
        raise BenchmarkError(
            f"benchmark {name}: ground truth names database image {int(ids.max())}; there are {len(database)}"
        )
    if labelled_Q is not None and labelled_Q.all():
        labelled_Q = None
    return Benchmark(
        name,
        protocol,
        list(database),
        list(queries),
        offsets,
        ids,
        tuple(notes),
        labelled_Q=labelled_Q,
        at=at,
    )


def without_labels(
    name: str, database: Sequence[Path], queries: Sequence[Path], notes: Sequence[str] = ()
) -> Benchmark:
    """A benchmark that has no ground truth: predictions can be made, no recall."""
    none = [np.zeros(0, dtype=np.int64)] * len(queries)
    labelled_Q = np.zeros(len(queries), dtype=bool)
    return make_benchmark(name, NO_LABELS, database, queries, none, notes, labelled_Q=labelled_Q)
