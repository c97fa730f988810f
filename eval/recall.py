"""Recall@K."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks import Benchmark


def recall_at(predictions_QK: NDArray[np.int64], benchmark: Benchmark, ks: list[int]) -> dict[int, float]:
    """Percent of queries with a positive among their first k predictions, for each k.

    All queries count: one without a positive is a miss. Predictions of -1 stand for none.
    """
    first_hit_Q = np.full(len(predictions_QK), np.inf)
    for query, row in enumerate(predictions_QK):
        hits = np.flatnonzero(np.isin(row, benchmark.positives(query)))
        if len(hits):
            first_hit_Q[query] = hits[0]
    return {k: 100.0 * float((first_hit_Q < k).mean()) for k in ks}
