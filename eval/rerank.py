"""Re-ranking by mutual nearest neighbours of local features (EffoVPR; RerankVPR), sharded over ranks by query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from configs.ranks import on_all_ranks
from configs.schema import RerankConfig
from eval.features import StoredFeatures
from eval.matching import match_scores
from eval.pairs import pair_blocks
from eval.search import search_ranks

AUTO_SAMPLE = 128
AUTO_AT_LEAST = 20  # fewer unchanged images than this teach nothing


def fuse(
    scores_QT: NDArray[np.float32],
    similarities_QT: NDArray[np.float32],
    patches_Q: NDArray[np.int64],
    global_weight: float,
) -> NDArray[np.float64]:
    """Keys that sort candidates: the score itself, or score / patches of the query + weight * global cosine."""
    key_QT = scores_QT.astype(np.float64)
    if global_weight:
        key_QT = key_QT / np.maximum(patches_Q, 1)[:, None] + global_weight * similarities_QT
    return key_QT


def reorder(key_QT: NDArray[np.float64], predictions_QK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Predictions with the first T sorted by key, ties in first-stage order; the others stay behind them."""
    depth = key_QT.shape[1]
    order_QT = np.argsort(-key_QT, axis=1, kind="stable")
    head_QT = np.take_along_axis(predictions_QK[:, :depth], order_QT, axis=1)
    return np.concatenate([head_QT, predictions_QK[:, depth:]], axis=1)


@torch.inference_mode()
def score_candidates(
    queries: StoredFeatures,
    query_ids_Q: NDArray[np.int64],
    database: StoredFeatures,
    candidates_QT: NDArray[np.int64],
    config: RerankConfig,
    device: torch.device,
    on_progress: OnProgress = untold,
) -> NDArray[np.float32]:
    """Match scores [Q, T] of queries with their candidates, equal on every rank.

    Each score comes from one rank, so it is the same at any number of them.
    """
    share = dist.get_rank(), dist.get_world_size()
    with on_all_ranks():
        scores_QT = _scores(queries, query_ids_Q, database, candidates_QT, config, device, on_progress, share)
    dist.all_reduce(scores_QT)
    return scores_QT.cpu().numpy()


@torch.inference_mode()
def score_here(
    queries: StoredFeatures,
    query_ids_Q: NDArray[np.int64],
    database: StoredFeatures,
    candidates_QT: NDArray[np.int64],
    config: RerankConfig,
    device: torch.device,
    on_progress: OnProgress = untold,
) -> NDArray[np.float32]:
    """The same by this process alone; needs no process group."""
    return _scores(queries, query_ids_Q, database, candidates_QT, config, device, on_progress, (0, 1)).cpu().numpy()


def _scores(
    queries: StoredFeatures,
    query_ids_Q: NDArray[np.int64],
    database: StoredFeatures,
    candidates_QT: NDArray[np.int64],
    config: RerankConfig,
    device: torch.device,
    on_progress: OnProgress,
    share: tuple[int, int],
) -> torch.Tensor:
    """Scores [Q, T] of the pairs that are this rank's by its `share` (rank, world size); 0 for the others."""
    scores_QT = torch.zeros(candidates_QT.shape, device=device)
    blocks = pair_blocks(queries, query_ids_Q, database, candidates_QT, config.memory_mb, device, on_progress, share)
    for block in blocks:
        scores_QT[block.rows, block.columns] = match_scores(block.queries, block.candidates, config)
    return scores_QT


def patch_counts(features: StoredFeatures) -> NDArray[np.int64]:
    """Kept patches of every image."""
    return np.concatenate([np.asarray(shard["count"]) for shard in features.shards]).astype(np.int64)


Score = Callable[..., NDArray[np.float32]]  # as `score_candidates`


@dataclass(frozen=True)
class Reranked:
    """Predictions after matching, match scores of the first T before it, and how many queries it left alone.

    Scores of a query that was left alone, and of a candidate that is none, are NaN.
    """

    predictions_QK: NDArray[np.int64]
    scores_QT: NDArray[np.float32]
    num_left_alone: int


def rerank(
    queries: StoredFeatures,
    database: StoredFeatures,
    predictions_QK: NDArray[np.int64],
    similarities_QK: NDArray[np.float32],
    config: RerankConfig,
    device: torch.device,
    *,
    auto_margin: float = np.inf,
    on_progress: OnProgress = untold,
    score: Score = score_candidates,
) -> Reranked:
    """The first top_k predictions of each query re-sorted; equal on every rank and at any number of ranks.

    With `score_here` it is the work of this process alone.
    Queries whose first-stage margin reaches `auto_margin` keep their order (see `learn_margin`).
    """
    depth = min(config.top_k, predictions_QK.shape[1])
    matched_q = np.flatnonzero(margins(similarities_QK) < auto_margin)
    scores_QT = np.full((len(predictions_QK), depth), np.nan, dtype=np.float32)
    ranked_QK = predictions_QK.copy()
    if len(matched_q):
        candidates = predictions_QK[matched_q, :depth]
        found = np.maximum(candidates, 0)  # -1 stands for nothing found
        scores = score(queries, matched_q, database, found, config, device, on_progress)
        patches = patch_counts(queries)[matched_q]
        key = fuse(scores, similarities_QK[matched_q, :depth], patches, config.global_weight)
        key[candidates < 0] = -np.inf
        scores_QT[matched_q] = np.where(candidates < 0, np.float32(np.nan), scores)
        ranked_QK[matched_q] = reorder(key, predictions_QK[matched_q])
    return Reranked(ranked_QK, scores_QT, len(predictions_QK) - len(matched_q))


def margins(similarities_QK: NDArray[np.float32]) -> NDArray[np.float64]:
    """First-stage cosine of the first minus the second candidate; infinite where there is one."""
    if similarities_QK.shape[1] < 2:
        return np.full(len(similarities_QK), np.inf)
    return similarities_QK[:, 0].astype(np.float64) - similarities_QK[:, 1]


def learn_margin(
    database: StoredFeatures, config: RerankConfig, device: torch.device, block_bytes: int
) -> tuple[float, int]:
    """The least first-stage margin from which on matching never changed the first candidate, and the sample's size.

    Learned on the database alone, without labels: a spread of its images as queries against all others. Infinite, so
    that nothing is left alone, where fewer than AUTO_AT_LEAST images agree.
    """
    sample = np.unique(np.linspace(0, len(database) - 1, min(AUTO_SAMPLE, len(database))).astype(np.int64))
    k = min(config.top_k + 1, len(database))
    if k < 3:
        return np.inf, len(sample)
    with on_all_ranks():
        queries_SD = np.concatenate([database.descriptors(i, i + 1) for i in sample])
    similarities_SK, ids_SK = search_ranks(queries_SD, _own_blocks(database, block_bytes), k)
    others = [(ids != i) & (np.cumsum(ids != i) < k) for i, ids in zip(sample, ids_SK, strict=True)]
    ids_ST = np.stack([ids[keep] for ids, keep in zip(ids_SK, others, strict=True)])
    similarities_ST = np.stack([cos[keep] for cos, keep in zip(similarities_SK, others, strict=True)])
    scores_ST = score_candidates(database, sample, database, ids_ST, config, device)
    key_ST = fuse(scores_ST, similarities_ST, patch_counts(database)[sample], config.global_weight)
    changed_S = key_ST.argmax(axis=1) != 0
    return margin_from(margins(similarities_ST), changed_S), len(sample)


def margin_from(margin_S: NDArray[np.float64], changed_S: NDArray[np.bool_]) -> float:
    """The least margin above every margin of an image whose first candidate changed; infinite if too few lie above."""
    worst = float(margin_S[changed_S].max(initial=-np.inf))
    above = margin_S[margin_S > worst]
    return float(above.min()) if len(above) >= AUTO_AT_LEAST else float("inf")


def _own_blocks(database: StoredFeatures, block_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    return database.blocks(dist.get_rank(), dist.get_world_size(), block_bytes)
