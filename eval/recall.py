"""Recall@K, and how sure it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.benchmark import Benchmark

Interval = tuple[float, float]


def first_hits(predictions_QK: NDArray[np.int64], benchmark: Benchmark) -> NDArray[np.float64]:
    """Place (from 0) of each query's first positive among its predictions; infinite where there is none."""
    first_hit_Q = np.full(len(predictions_QK), np.inf)
    for query, row in enumerate(predictions_QK):
        hits = np.flatnonzero(np.isin(row, benchmark.positives(query)))
        if len(hits):
            first_hit_Q[query] = hits[0]
    return first_hit_Q


def recall_at(predictions_QK: NDArray[np.int64], benchmark: Benchmark, ks: list[int]) -> dict[int, float]:
    """Percent of queries with a positive among their first k predictions, for each k.

    All queries count: one without a positive is a miss. Predictions of -1 stand for none.
    """
    first_hit_Q = first_hits(predictions_QK, benchmark)
    return {k: 100.0 * float((first_hit_Q < k).mean()) for k in ks}


def bootstrap_means(values_Q: NDArray[np.floating], resamples: int, seed: int = 0) -> Interval:
    """95 % interval of the mean by the percentile bootstrap over queries."""
    rng = np.random.default_rng(seed)
    values, counts = np.unique(values_Q, return_counts=True)  # few values: a resample is a multinomial draw
    draws_RV = rng.multinomial(len(values_Q), counts / len(values_Q), size=resamples)
    low, high = np.percentile(draws_RV @ values / len(values_Q), [2.5, 97.5])
    return float(low), float(high)


def recall_intervals(
    predictions_QK: NDArray[np.int64], benchmark: Benchmark, ks: list[int], resamples: int
) -> dict[int, Interval]:
    """95 % interval of recall@K in percent, for each k."""
    first_hit_Q = first_hits(predictions_QK, benchmark)
    return {k: bootstrap_means(100.0 * (first_hit_Q < k), resamples) for k in ks}


def gain_intervals(
    before_QK: NDArray[np.int64], after_QK: NDArray[np.int64], benchmark: Benchmark, ks: list[int], resamples: int
) -> dict[int, tuple[float, float, float]]:
    """Gain of recall@K in points with its 95 % interval, paired: each resample draws queries, not recalls."""
    before_Q, after_Q = first_hits(before_QK, benchmark), first_hits(after_QK, benchmark)
    gains = {k: 100.0 * ((after_Q < k).astype(np.float64) - (before_Q < k)) for k in ks}
    return {k: (float(gain_Q.mean()), *bootstrap_means(gain_Q, resamples)) for k, gain_Q in gains.items()}
