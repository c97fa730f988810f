"""One benchmark, first stage and re-ranked, over all ranks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.schema import EvalConfig
from eval.benchmarks import Benchmark
from eval.extract import Features, extract, slice_bounds
from eval.recall import recall_at
from eval.rerank import rerank
from eval.search import gather_slices, search_ranks
from model.network import PlaceModel

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Result:
    """Recalls in percent by K, timings in seconds, and the predictions that they come from."""

    name: str
    protocol: str
    num_database: int
    num_queries: int
    num_without_positive: int
    image_size: int
    recall: dict[int, float]
    recall_reranked: dict[int, float] | None
    timings: dict[str, float]
    predictions_QK: NDArray[np.int64]
    reranked_QK: NDArray[np.int64] | None

    def as_dict(self) -> dict[str, Any]:
        """All but the predictions, for JSON."""
        hidden = ("predictions_QK", "reranked_QK")
        return {key: value for key, value in vars(self).items() if key not in hidden}

    def metrics(self) -> dict[str, float]:
        """Flat figures for a tracker."""
        flat = {f"recall_{k}": value for k, value in self.recall.items()}
        flat |= {f"reranked_recall_{k}": value for k, value in (self.recall_reranked or {}).items()}
        return flat | self.timings

    def line(self) -> str:
        """Recalls in one line, with their protocol."""
        ks = "/".join(str(k) for k in self.recall)
        text = f"{self.name} ({self.protocol}) R@{ks} {' / '.join(f'{v:.1f}' for v in self.recall.values())}"
        if self.recall_reranked:
            text += f", re-ranked {' / '.join(f'{v:.1f}' for v in self.recall_reranked.values())}"
        return text


class _Clock:
    """Wall time between points that all ranks have reached with their device idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, of the slowest rank."""
        now = self._now()
        seconds, self.last = now - self.last, now
        return seconds


class FeatureStore:
    """Features of image lists that several benchmarks name, held until the last of them has used them.

    One gallery with many query sets is extracted once; the seconds it took count for each benchmark.
    """

    def __init__(self, benchmarks: list[Benchmark]) -> None:
        self.uses = Counter(tuple(paths) for b in benchmarks for paths in (b.database, b.queries))
        self.held: dict[tuple[Path, ...], tuple[Features, float]] = {}

    def take(self, paths: list[Path], extract_now: Callable[[], tuple[Features, float]]) -> tuple[Features, float]:
        """Features of `paths` and the seconds that extracting them took."""
        key = tuple(paths)
        found = self.held.pop(key, None) or extract_now()
        self.uses[key] -= 1
        if self.uses[key] > 0:
            self.held[key] = found
        return found


def evaluate(
    model: PlaceModel,
    benchmark: Benchmark,
    config: EvalConfig,
    on_progress: Report | None = None,
    store: FeatureStore | None = None,
) -> Result:
    """Extracts on all ranks, searches exactly, re-ranks if asked to; the same recalls and predictions on every rank.

    `on_progress(done, total, note)` is called on each rank; `store` keeps features for the benchmarks that follow. The
    model is left in the mode it was in.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    num_database, num_queries = len(benchmark.database), len(benchmark.queries)
    report = on_progress or (lambda *_: None)
    store = store or FeatureStore([benchmark])
    was_training = model.training
    model.eval()

    clock = _Clock(model.device)
    total = num_database + num_queries

    def features_of(paths: list[Path], offset: int) -> tuple[Features, float]:
        def extract_now() -> tuple[Features, float]:
            def done(images: int) -> None:
                report(min(total, offset + images * world), total, "features")

            features = extract(model, paths, config, rank=rank, world_size=world, on_progress=done)
            return features, clock.lap()

        return store.take(paths, extract_now)

    database, database_s = features_of(benchmark.database, 0)
    queries, queries_s = features_of(benchmark.queries, num_database)
    timings = {"extraction_s_per_image": (database_s + queries_s) / total}
    clock.lap()

    counts = [stop - start for start, stop in (slice_bounds(num_queries, r, world) for r in range(world))]
    queries_QD = gather_slices(queries.descriptors_ID, counts)
    k = max(*config.recall_at, config.rerank.top_k if config.rerank.enabled else 1)
    k = min(k, num_database)
    similarities_QK, predictions_QK = search_ranks(queries_QD, database.descriptors_ID, database.start, k)
    timings["retrieval_s_per_query"] = clock.lap() / num_queries

    reranked_QK = None
    if config.rerank.enabled:
        reranked_QK, _ = rerank(
            queries,
            database,
            predictions_QK,
            similarities_QK,
            config.rerank,
            on_progress=lambda done: report(done, num_queries, "re-ranking"),
        )
        timings["rerank_s_per_query"] = clock.lap() / num_queries
    model.train(was_training)
    return Result(
        name=benchmark.name,
        protocol=benchmark.protocol,
        num_database=num_database,
        num_queries=num_queries,
        num_without_positive=int((np.diff(benchmark.positive_offsets) == 0).sum()),
        image_size=config.image_size,
        recall=recall_at(predictions_QK, benchmark, config.recall_at),
        recall_reranked=None if reranked_QK is None else recall_at(reranked_QK, benchmark, config.recall_at),
        timings=timings,
        predictions_QK=predictions_QK,
        reranked_QK=reranked_QK,
    )
