"""Recall@K, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.benchmark import Benchmark

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A mean over queries and its 95 % interval, None if none was asked for."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Recall:
    """Recall@K of one stage in percent, or the gain of one over another in points, for each K.

    It has no K, and is false, if no query has ground truth.
    """

    by_k: dict[int, Figure]

    def __getitem__(self, k: int) -> float:
        return self.by_k[k].value

    def __bool__(self) -> bool:
        return bool(self.by_k)

    def __str__(self) -> str:
        return " / ".join(f"{figure.value:.1f}" for figure in self.by_k.values())

    @property
    def values(self) -> dict[int, float]:
        """The figures without their intervals, by K."""
        return {k: figure.value for k, figure in self.by_k.items()}

    @property
    def intervals(self) -> dict[int, Interval]:
        """The 95 % intervals that are known, by K."""
        return {k: figure.interval for k, figure in self.by_k.items() if figure.interval}


def first_hits(predictions_QK: NDArray[np.int64], benchmark: Benchmark) -> NDArray[np.float64]:
    """Place (from 0) of each query's first positive among its predictions; infinite where there is none."""
    first_hit_Q = np.full(len(predictions_QK), np.inf)
    for query, row in enumerate(predictions_QK):
        hits = np.flatnonzero(np.isin(row, benchmark.positives(query)))
        if len(hits):
            first_hit_Q[query] = hits[0]
    return first_hit_Q


def recall_at(predictions_QK: NDArray[np.int64], benchmark: Benchmark, ks: Iterable[int]) -> dict[int, float]:
    """Percent of queries with a positive among their first k predictions, for each k; no k if none is labelled.

    All queries with ground truth count: one without a positive is a miss. Predictions of -1 stand for none.
    """
    first_hit_Q = _hits_of_labelled(predictions_QK, benchmark)
    return {k: 100.0 * float((first_hit_Q < k).mean()) for k in ks} if len(first_hit_Q) else {}


def recall_of(predictions_QK: NDArray[np.int64], benchmark: Benchmark, ks: Iterable[int], resamples: int) -> Recall:
    """`recall_at`, each with its bootstrap interval if `resamples` is not 0."""
    first_hit_Q = _hits_of_labelled(predictions_QK, benchmark)
    if not len(first_hit_Q):
        return Recall({})
    hits = {k: first_hit_Q < k for k in ks}
    return Recall(
        {
            k: Figure(100.0 * float(hit_Q.mean()), bootstrap_means(100.0 * hit_Q, resamples) if resamples else None)
            for k, hit_Q in hits.items()
        }
    )


def gain_of(
    before_QK: NDArray[np.int64],
    after_QK: NDArray[np.int64],
    benchmark: Benchmark,
    ks: Iterable[int],
    resamples: int,
) -> Recall:
    """Gain of recall@K in points with its 95 % interval, paired: each resample draws queries, not recalls."""
    before_Q, after_Q = _hits_of_labelled(before_QK, benchmark), _hits_of_labelled(after_QK, benchmark)
    if not len(before_Q):
        return Recall({})
    gains = {k: 100.0 * ((after_Q < k).astype(np.float64) - (before_Q < k)) for k in ks}
    return Recall({k: Figure(float(gain_Q.mean()), bootstrap_means(gain_Q, resamples)) for k, gain_Q in gains.items()})


def _hits_of_labelled(predictions_QK: NDArray[np.int64], benchmark: Benchmark) -> NDArray[np.float64]:
    """`first_hits` of the queries that have ground truth."""
    first_hit_Q = first_hits(predictions_QK, benchmark)
    return first_hit_Q if benchmark.labelled_Q is None else first_hit_Q[benchmark.labelled_Q]


def bootstrap_means(values_Q: NDArray[np.floating], resamples: int, seed: int = 0) -> Interval:
    """95 % interval of the mean by the percentile bootstrap over queries."""
    rng = np.random.default_rng(seed)
    values, counts = np.unique(values_Q, return_counts=True)  # few values: a resample is a multinomial draw
    draws_RV = rng.multinomial(len(values_Q), counts / len(values_Q), size=resamples)
    low, high = np.percentile(draws_RV @ values / len(values_Q), [2.5, 97.5])
    return float(low), float(high)
