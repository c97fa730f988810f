"""One benchmark, first stage and re-ranked, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.progress import OnProgress, PartOf, untold
from configs.ranks import on_all_ranks
from configs.schema import EvalConfig
from data_pipeline.tar_writer import BadImages
from eval.approximate import Trained
from eval.benchmarks.benchmark import Benchmark
from eval.clock import Clock
from eval.depth import depth_rule, margin_rule, match_own_images
from eval.extract import extract, fit_projection
from eval.feature_cache import Cached, FeatureCache
from eval.features import StoredFeatures, digest, files_digest, weights_digest
from eval.image_names import name_images
from eval.pixels import interpolation_of, pixel_rule
from eval.recall import gain_of, recall_of
from eval.rerank import Reranked, margins, rerank
from eval.rerank_rule import rerank_rule
from eval.result import Result
from eval.search import agreement, search_ranks
from eval.train_index import train_together
from eval.unreadable import as_bad_images, ranked_without, unreadable_note
from model.network import PlaceModel

# What of the re-ranking's settings decides which local features are stored.
STORED_AS = {
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


@dataclass(frozen=True)
class FirstStage:
    """Features and what retrieval found with them, for those who want more than a result."""

    database: StoredFeatures
    queries: StoredFeatures
    predictions_QK: NDArray[np.int64]
    similarities_QK: NDArray[np.float32]


OnFeatures = Callable[[FirstStage], None]


def evaluate(
    model: PlaceModel,
    benchmark: Benchmark,
    config: EvalConfig,
    on_progress: OnProgress = untold,
    cache: FeatureCache | None = None,
    on_features: OnFeatures | None = None,
) -> Result:
    """Extracts on all ranks, searches, re-ranks if asked to; the same recalls and predictions on every rank.

    `on_progress` is called on each rank; `cache` holds features for the benchmarks that follow; `on_features` is called
    on each rank while the features are there. The model is left in the mode it was in.
    """
    cache = cache or FeatureCache([benchmark], config.features)
    timings: dict[str, float] = {}
    notes = list(benchmark.notes)
    was_training = model.training
    model.eval()
    database, queries = features_of(model, benchmark, config, cache, timings, notes, on_progress)
    clock = Clock(model.device)
    found, index_agreement = _search(database, queries, config, clock, timings)
    reranked = _rerank(found, config, clock, timings, notes, on_progress) if config.rerank.enabled else None
    if on_features:
        on_features(found)
    bytes_per_image, local_bytes = database.bytes_per_image, database.local_bytes_per_image if reranked else 0.0
    cache.release(benchmark)
    model.train(was_training)
    ks, resamples, predictions_QK = config.recall_at, config.bootstrap, found.predictions_QK
    reranked_QK = reranked.predictions_QK if reranked else None
    gain = None
    if reranked_QK is not None and resamples and benchmark.num_labelled:
        gain = gain_of(predictions_QK, reranked_QK, benchmark, ks, resamples)
    return Result(
        name=benchmark.name,
        protocol=benchmark.protocol,
        pixels=pixel_rule(config),
        num_database=len(benchmark.database),
        num_queries=len(benchmark.queries),
        num_without_positive=benchmark.num_without_positive,
        image_size=config.image_size,
        precision=precision_of(model, config),
        retrieved=recall_of(predictions_QK, benchmark, ks, resamples),
        predictions_QK=predictions_QK,
        timings=timings,
        reranked=None if reranked_QK is None else recall_of(reranked_QK, benchmark, ks, resamples),
        reranked_QK=reranked_QK,
        gain=gain,
        mb_per_image=bytes_per_image / 1e6,
        kb_local_per_image=local_bytes / 1e3,
        index=config.faiss_index,
        index_agreement=index_agreement,
        num_left_alone=reranked.num_left_alone if reranked else 0,
        mean_depth=reranked.mean_depth if reranked else 0.0,
        notes=tuple(notes),
        layout=benchmark.layout,
        num_labelled=None if benchmark.labelled_Q is None else benchmark.num_labelled,
        similarities_QK=found.similarities_QK,
        matches_QT=reranked.scores_QT if reranked else None,
        rerank=config.rerank.model_dump(exclude={"memory_mb"}) if reranked else None,
        rerank_rule=rerank_rule(config.rerank) if reranked else "",
    )


def precision_of(model: PlaceModel, config: EvalConfig) -> str:
    """What a forward pass is computed in: the precision of the weights, or autocast over float32."""
    held = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
    return "bf16 autocast" if (held, config.precision) == ("fp32", "bf16") else held


def check_depth(benchmarks: list[Benchmark], config: EvalConfig) -> None:
    """Raises ValueError if a K exceeds the database of a benchmark: that recall would say nothing."""
    for benchmark in benchmarks:
        if benchmark.num_labelled and config.recall_at[-1] > len(benchmark.database):
            raise ValueError(
                f"eval.recall_at {config.recall_at[-1]}: {benchmark.name} has {len(benchmark.database)} database "
                f"images; use at most {len(benchmark.database)}"
            )


def features_of(
    model: PlaceModel,
    benchmark: Benchmark,
    config: EvalConfig,
    cache: FeatureCache,
    timings: dict[str, float],
    notes: list[str],
    on_progress: OnProgress = untold,
) -> tuple[StoredFeatures, StoredFeatures]:
    """Features of database and queries: those that `cache` has, or extracted; their time goes to `timings`."""
    clock = Clock(model.device)
    total = len(benchmark.database) + len(benchmark.queries)
    projection_CK = fit_projection(model, benchmark.database, config)
    seconds = clock.lap()
    about = _about(model, config) | {
        "projection": None if projection_CK is None else digest(projection_CK.cpu().tolist()),
    }
    allowed = BadImages(config.max_bad, total)
    both: list[Cached] = []
    for paths, before in ((benchmark.database, 0), (benchmark.queries, len(benchmark.database))):
        with on_all_ranks():
            key = digest({**about, "images": files_digest(paths)})
        cached = cache.find(paths, key)
        if cached is None:
            earlier = cache.of_earlier_run(key)
            told = PartOf(on_progress, total, "features", before, each=dist.get_world_size())
            folder = cache.folder(key)
            features = extract(
                *(model, paths, config, folder),
                key=key,
                projection_CK=projection_CK,
                allowed=allowed,
                on_progress=told,
            )
            cached = Cached(features, clock.lap(), earlier)
            cache.hold(paths, key, cached)
        both.append(cached)
    timings["extraction_s_per_image"] = (seconds + sum(cached.seconds for cached in both)) / total
    if all(cached.of_earlier_run for cached in both):
        notes.append("features of an earlier run were read: the time per image is no extraction's")
    database, queries = (cached.features for cached in both)
    if cache.kept:
        with on_all_ranks():
            if dist.get_rank() == 0:
                name_images(database, benchmark.database, "database")
                name_images(queries, benchmark.queries, "queries")
    bad_D = as_bad_images(benchmark.database, database.unreadable)
    bad_Q = as_bad_images(benchmark.queries, queries.unreadable)
    allowed.check([*bad_Q, *bad_D])
    if note := unreadable_note(bad_D, bad_Q, len(database), len(queries)):
        notes.append(note)
    return database, queries


def _about(model: PlaceModel, config: EvalConfig) -> dict[str, Any]:
    """What decides the features of an image, for the digest that they are kept under."""
    preprocessing: list[Any] = [config.image_size, config.resize, precision_of(model, config), config.batch_size]
    if interpolation_of(config) != "bilinear":
        preprocessing.append(interpolation_of(config))
    return {
        "weights": weights_digest(model) if config.features else "these",
        "preprocessing": preprocessing,
        "decoded": "upright",  # as EXIF says
        "local": config.rerank.model_dump(include=STORED_AS) if config.rerank.enabled else None,
    }


def _search(
    database: StoredFeatures, queries: StoredFeatures, config: EvalConfig, clock: Clock, timings: dict[str, float]
) -> tuple[FirstStage, float | None]:
    """What retrieval finds, and the percent of exact neighbours among it if the index is approximate."""
    deepest = max(config.recall_at[-1], config.rerank.top_k if config.rerank.enabled else 1)
    k = min(deepest, len(database))
    fetched = min(deepest + len(database.unreadable), len(database))
    block_bytes = config.search_block_mb << 20
    with on_all_ranks():
        queries_QD = queries.descriptors()

    def search(trained: Trained | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        blocks = database.blocks(dist.get_rank(), dist.get_world_size(), block_bytes)
        similarities_QK, predictions_QK = search_ranks(queries_QD, blocks, fetched, trained)
        return ranked_without(predictions_QK, similarities_QK, database.unreadable, queries.unreadable, k)

    exact = config.faiss_index == "Flat"
    trained = None if exact else train_together(config.faiss_index, config.faiss_params, database)
    predictions_QK, similarities_QK = search(trained)
    timings["retrieval_s_per_query"] = clock.lap() / len(queries)
    found = FirstStage(database, queries, predictions_QK, similarities_QK)
    if exact:
        return found, None
    shown = slice(config.recall_at[-1])
    agreed = agreement(predictions_QK[:, shown], search()[0][:, shown])
    clock.lap()
    return found, agreed


def _rerank(
    found: FirstStage,
    config: EvalConfig,
    clock: Clock,
    timings: dict[str, float],
    notes: list[str],
    on_progress: OnProgress,
) -> Reranked:
    """The first candidates re-sorted: `top_k` of each query, or as many as `rerank.when` has learned to match."""
    num_queries, device, settings = len(found.queries), clock.device, config.rerank
    depth_Q = None
    if settings.when != "always":
        depth_Q, note = _learned_depths(found, config, device)
        timings["auto_s"] = clock.lap()
        notes.append(note)
    reranked = rerank(
        found.queries,
        found.database,
        found.predictions_QK,
        found.similarities_QK,
        settings,
        device,
        depth_Q=depth_Q,
        on_progress=PartOf(on_progress, num_queries, "re-ranking"),
    )
    timings["rerank_s_per_query"] = clock.lap() / num_queries
    return reranked


def _learned_depths(found: FirstStage, config: EvalConfig, device: torch.device) -> tuple[NDArray[np.int64], str]:
    """Candidates to match of each query, by what the database alone teaches, and a note on that."""
    settings, cosine_QK = config.rerank, found.similarities_QK
    own = match_own_images(found.database, settings, device, config.search_block_mb << 20)
    learned = f"learned on {len(own.key_ST) if own else 0} database images"
    if settings.when == "auto":
        margin = margin_rule(own)
        depth_Q = np.where(margins(cosine_QK) < margin, settings.top_k, 0)
        return depth_Q, f"auto: margins from {margin:.4f} on are left alone, {learned}"
    rule = depth_rule(own)
    return rule.depths(cosine_QK, settings.top_k), (
        f"adaptive: candidates within {rule.reach:.4f} of the first one's cosine are matched, all {settings.top_k} "
        f"where that is below {rule.sure:.4f}, {learned}"
    )
