"""One benchmark, first stage and re-ranked, over all ranks."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import on_all_ranks
from configs.schema import EvalConfig
from eval.benchmarks.benchmark import Benchmark
from eval.extract import extract, fit_projection
from eval.features import StoredFeatures, digest, files_digest, weights_digest
from eval.recall import Interval, gain_intervals, recall_at, recall_intervals
from eval.rerank import learn_margin, rerank
from eval.scratch import common_temporary_folder
from eval.search import agreement, search_ranks
from model.network import PlaceModel

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FirstStage:
    """Features and what retrieval found with them, for those who want more than a result."""

    database: StoredFeatures
    queries: StoredFeatures
    predictions_QK: NDArray[np.int64]
    similarities_QK: NDArray[np.float32]


OnFeatures = Callable[[FirstStage], None]


@dataclass(frozen=True)
class Result:
    """Recalls in percent by K with 95 % intervals, cost, and the predictions that they come from."""

    name: str
    protocol: str
    num_database: int
    num_queries: int
    num_without_positive: int
    image_size: int
    precision: str  # of the forward pass
    recall: dict[int, float]
    recall_reranked: dict[int, float] | None
    timings: dict[str, float]
    predictions_QK: NDArray[np.int64]
    reranked_QK: NDArray[np.int64] | None
    recall_interval: dict[int, Interval] = field(default_factory=dict)
    reranked_interval: dict[int, Interval] = field(default_factory=dict)
    gain: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """Re-ranked minus first-stage recall in points, and its paired 95 % interval."""
    mb_per_image: float = 0.0
    kb_local_per_image: float = 0.0
    index: str = "Flat"
    index_agreement: float | None = None
    """Percent of the exact neighbours that an approximate index found."""
    num_left_alone: int = 0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the predictions, for JSON."""
        hidden = ("predictions_QK", "reranked_QK")
        return {key: value for key, value in vars(self).items() if key not in hidden}

    def metrics(self) -> dict[str, float]:
        """Flat figures for a tracker."""
        flat = {f"recall_{k}": value for k, value in self.recall.items()}
        flat |= {f"reranked_recall_{k}": value for k, value in (self.recall_reranked or {}).items()}
        flat |= {f"gain_{k}": gain for k, (gain, _, _) in self.gain.items()}
        return flat | self.timings | {"mb_per_image": self.mb_per_image}

    def line(self) -> str:
        """Recalls in one line, with their protocol."""
        ks = "/".join(str(k) for k in self.recall)
        recalls = " / ".join(f"{value:.1f}" for value in self.recall.values())
        text = f"{self.name} ({self.protocol}, {self.precision}) R@{ks} {recalls}"
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
    """Where features lie: kept in `config.features`, or in a temporary folder until the last benchmark has used them.

    The temporary folder is in `beside` if the ranks' hosts have none of their own in common. One gallery with many
    query sets is extracted once; the seconds it took count for each benchmark.
    """

    def __init__(self, benchmarks: list[Benchmark], beside: Path | None = None) -> None:
        self.beside = beside
        self.uses = Counter(tuple(paths) for b in benchmarks for paths in (b.database, b.queries))
        self.held: dict[tuple[Any, ...], tuple[StoredFeatures, float]] = {}
        self.temporary: Path | None = None
        self.owner: TemporaryDirectory[str] | None = None  # removes it, on rank 0

    def take(
        self,
        paths: list[Path],
        key: str,
        kept: Path | None,
        extract_now: Callable[[Path], tuple[StoredFeatures, float]],
    ) -> tuple[StoredFeatures, float]:
        """Features of `paths` made as `key` says, and the seconds that extracting them took."""
        wanted = (tuple(paths), key)
        found = self.held.pop(wanted, None) or extract_now((kept or self._temporary()) / key[:16])
        self.uses[wanted[0]] -= 1
        self.held[wanted] = found
        return found

    def release(self, *, kept: bool) -> None:
        """Lets go of what no benchmark needs any more, on every rank once all are done with it."""
        dist.barrier()
        for wanted in [wanted for wanted in self.held if self.uses[wanted[0]] <= 0]:
            features, _ = self.held.pop(wanted)
            if not kept and dist.get_rank() == 0:
                shutil.rmtree(features.folder, ignore_errors=True)  # NFS keeps what is still mapped

    def _temporary(self) -> Path:
        if self.temporary is None:
            self.temporary, self.owner = common_temporary_folder(self.beside)
        return self.temporary


def features_of(
    model: PlaceModel,
    benchmark: Benchmark,
    config: EvalConfig,
    store: FeatureStore,
    report: Report,
) -> tuple[StoredFeatures, StoredFeatures, float, bool]:
    """Features of database and queries, the seconds an image that they took, and whether an earlier run began both."""
    clock, world = _Clock(model.device), dist.get_world_size()
    num_database, num_queries = len(benchmark.database), len(benchmark.queries)
    total = num_database + num_queries
    projection_CK = fit_projection(model, benchmark.database, config)
    basis = None if projection_CK is None else digest(projection_CK.cpu().tolist())
    fit_s = clock.lap()
    about = {
        "weights": weights_digest(model) if config.features else "these",
        "preprocessing": [config.image_size, config.resize, precision_of(model, config), config.batch_size],
        "local": config.rerank.model_dump(include=_STORED_AS) if config.rerank.enabled else None,
        "projection": basis,
    }
    kept = [True]

    def of(paths: list[Path], offset: int) -> tuple[StoredFeatures, float]:
        with on_all_ranks():
            key = digest({**about, "images": files_digest(paths)})
        of_this_run = config.features is None or (tuple(paths), key) in store.held
        if of_this_run or not (config.features / key[:16] / "index.json").is_file():  # type: ignore[operator]
            kept.append(False)

        def extract_now(folder: Path) -> tuple[StoredFeatures, float]:
            def done(images: int) -> None:
                report(min(total, offset + images * world), total, "features")

            found = extract(model, paths, config, folder, key=key, projection_CK=projection_CK, on_progress=done)
            return found, clock.lap()

        return store.take(paths, key, config.features, extract_now)

    database, database_s = of(benchmark.database, 0)
    queries, queries_s = of(benchmark.queries, num_database)
    return database, queries, (fit_s + database_s + queries_s) / total, all(kept)


_STORED_AS = {
    "layer",
    "facet",
    "include_cls",
    "hierarchy",
    "saliency_layer",
    "saliency",
    "saliency_thresh",
    "dtype",
    "project",
    "project_size",
}


def precision_of(model: PlaceModel, config: EvalConfig) -> str:
    """What a forward pass is computed in: the precision of the weights, or autocast over float32."""
    held = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
    return "bf16 autocast" if (held, config.precision) == ("fp32", "bf16") else held


def check_depth(benchmarks: list[Benchmark], config: EvalConfig) -> None:
    """Raises ValueError if a K exceeds the database of a benchmark: that recall would say nothing."""
    for benchmark in benchmarks:
        if config.recall_at[-1] > len(benchmark.database):
            raise ValueError(
                f"eval.recall_at {config.recall_at[-1]}: {benchmark.name} has {len(benchmark.database)} database "
                f"images; use at most {len(benchmark.database)}"
            )


def evaluate(
    model: PlaceModel,
    benchmark: Benchmark,
    config: EvalConfig,
    on_progress: Report | None = None,
    store: FeatureStore | None = None,
    on_features: OnFeatures | None = None,
) -> Result:
    """Extracts on all ranks, searches, re-ranks if asked to; the same recalls and predictions on every rank.

    `on_progress(done, total, note)` is called on each rank; `store` keeps features for the benchmarks that follow;
    `on_features` is called on each rank while the features are there. The model is left in the mode it was in.
    """
    num_database, num_queries = len(benchmark.database), len(benchmark.queries)
    report = on_progress or (lambda *_: None)
    store = store or FeatureStore([benchmark])
    was_training = model.training
    model.eval()
    database, queries, extraction_s, kept = features_of(model, benchmark, config, store, report)
    timings = {"extraction_s_per_image": extraction_s}
    clock = _Clock(model.device)
    k = min(max(config.recall_at[-1], config.rerank.top_k if config.rerank.enabled else 1), num_database)
    block_bytes = config.search_block_mb << 20
    with on_all_ranks():
        queries_QD = queries.descriptors()

    def search(factory: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        blocks = database.blocks(dist.get_rank(), dist.get_world_size(), block_bytes)
        return search_ranks(queries_QD, blocks, k, factory, config.faiss_params)

    similarities_QK, predictions_QK = search(config.faiss_index)
    timings["retrieval_s_per_query"] = clock.lap() / num_queries
    index_agreement = None
    if config.faiss_index != "Flat":
        index_agreement = agreement(
            predictions_QK[:, : config.recall_at[-1]], search("Flat")[1][:, : config.recall_at[-1]]
        )
        clock.lap()

    reranked_QK, num_left_alone, notes = None, 0, list(benchmark.notes)
    if kept:
        notes.append("features of an earlier run were read: the time an image is no extraction's")
    if config.rerank.enabled:
        margin = np.inf
        if config.rerank.when == "auto":
            margin, sample = learn_margin(database, config.rerank, model.device, block_bytes)
            timings["auto_s"] = clock.lap()
            notes.append(f"auto: margins from {margin:.4f} on are left alone, learned on {sample} database images")
        reranked = rerank(
            queries,
            database,
            predictions_QK,
            similarities_QK,
            config.rerank,
            model.device,
            auto_margin=margin,
            on_progress=lambda done: report(done, num_queries, "re-ranking"),
        )
        reranked_QK, num_left_alone = reranked.predictions_QK, reranked.num_left_alone
        timings["rerank_s_per_query"] = clock.lap() / num_queries
    if on_features:
        on_features(FirstStage(database, queries, predictions_QK, similarities_QK))
    sizes = database.bytes_per_image, database.local_bytes_per_image if database.has_local else 0.0
    store.release(kept=config.features is not None)
    model.train(was_training)
    ks, resamples = config.recall_at, config.bootstrap
    again = reranked_QK is not None and resamples > 0
    return Result(
        name=benchmark.name,
        protocol=benchmark.protocol,
        num_database=num_database,
        num_queries=num_queries,
        num_without_positive=benchmark.num_without_positive,
        image_size=config.image_size,
        precision=precision_of(model, config),
        recall=recall_at(predictions_QK, benchmark, ks),
        recall_reranked=None if reranked_QK is None else recall_at(reranked_QK, benchmark, ks),
        timings=timings,
        predictions_QK=predictions_QK,
        reranked_QK=reranked_QK,
        recall_interval=recall_intervals(predictions_QK, benchmark, ks, resamples) if resamples else {},
        reranked_interval=recall_intervals(reranked_QK, benchmark, ks, resamples) if again else {},  # type: ignore[arg-type]
        gain=gain_intervals(predictions_QK, reranked_QK, benchmark, ks, resamples) if again else {},  # type: ignore[arg-type]
        mb_per_image=sizes[0] / 1e6,
        kb_local_per_image=sizes[1] / 1e3,
        index=config.faiss_index,
        index_agreement=index_agreement,
        num_left_alone=num_left_alone,
        notes=tuple(notes),
    )
