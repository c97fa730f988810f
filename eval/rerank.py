"""Re-ranking by mutual nearest neighbours of local features (EffoVPR; RerankVPR), sharded over ranks by query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import on_all_ranks
from configs.schema import RerankConfig
from eval.features import StoredFeatures
from eval.matching import match_scores, pair_bytes
from eval.search import search_ranks

MAX_QUERIES_PER_BLOCK = 16
CPU_BATCH_BYTES = 24 << 20  # on a CPU, larger batches leave its caches: half as fast
AUTO_SAMPLE = 128
AUTO_AT_LEAST = 20  # fewer unchanged images than this teach nothing


@dataclass(frozen=True)
class Plan:
    """How pairs are batched: `queries` at a time, with `candidates` of each at a time."""

    queries: int
    candidates: int


def plan_batches(
    queries: StoredFeatures, database: StoredFeatures, depth: int, memory_mb: int, device: torch.device
) -> Plan:
    """Batches that stay below `memory_mb`, and on a CPU near its caches; the same at any number of ranks.

    Raises ValueError if one pair of images does not fit.
    """
    bound = memory_mb << 20
    own = 8 * queries.max_patches * database.channels
    pair = pair_bytes(queries.max_patches, database.max_patches, database.channels)
    if own + pair > bound:
        raise ValueError(
            f"rerank.memory_mb {memory_mb}: one pair of images takes {(own + pair) / 2**20:.1f} MB; allow at least "
            f"{-(-(own + pair) // 2**20)}"
        )
    if device.type == "cpu":
        bound = min(bound, max(CPU_BATCH_BYTES, own + pair))
    if own + depth * pair > bound:
        return Plan(1, (bound - own) // pair)
    return Plan(max(1, min(MAX_QUERIES_PER_BLOCK, bound // (own + depth * pair))), depth)


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
    on_progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Match scores [Q, T] of queries with their candidates, equal on every rank.

    Blocks of queries go to ranks in turn; each score comes from one rank, so it is the same at any number of them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = plan_batches(queries, database, candidates_QT.shape[1], config.memory_mb, device)
    scores_QT = torch.zeros(candidates_QT.shape, device=device)
    blocks = list(blocks_of(len(query_ids_Q), plan.queries))
    with on_all_ranks():
        for block in blocks[rank::world]:
            own = queries.patches(query_ids_Q[block], device)
            for start in range(0, candidates_QT.shape[1], plan.candidates):
                part_BT = candidates_QT[block, start : start + plan.candidates]
                others = database.patches(part_BT.ravel(), device)
                scores_QT[block, start : start + plan.candidates] = match_scores(
                    own,
                    others,
                    nn_match_thresh=config.nn_match_thresh,
                    score=config.score,
                    geometry=config.geometry,
                    geometry_cells=config.geometry_cells,
                )
            if on_progress:
                on_progress(block.stop)
    dist.all_reduce(scores_QT)
    return scores_QT.cpu().numpy()


def blocks_of(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size`, the last one shorter."""
    for first in range(0, count, size):
        yield slice(first, min(count, first + size))


def patch_counts(features: StoredFeatures) -> NDArray[np.int64]:
    """Kept patches of every image."""
    return np.concatenate([np.asarray(shard["count"]) for shard in features.shards]).astype(np.int64)


@dataclass(frozen=True)
class Reranked:
    """Predictions after matching, the scores of the first T, and how many queries matching left alone."""

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
    on_progress: Callable[[int], None] | None = None,
) -> Reranked:
    """The first top_k predictions of each query re-sorted; equal on every rank and at any number of ranks.

    Queries whose first-stage margin reaches `auto_margin` keep their order (see `learn_margin`).
    """
    depth = min(config.top_k, predictions_QK.shape[1])
    matched_q = np.flatnonzero(margins(similarities_QK) < auto_margin)
    scores_QT = np.zeros((len(predictions_QK), depth), dtype=np.float32)
    ranked_QK = predictions_QK.copy()
    if len(matched_q):
        candidates = predictions_QK[matched_q, :depth]
        found = np.maximum(candidates, 0)  # -1 stands for nothing found
        scores = score_candidates(queries, matched_q, database, found, config, device, on_progress)
        patches = patch_counts(queries)[matched_q]
        key = fuse(scores, similarities_QK[matched_q, :depth], patches, config.global_weight)
        key[candidates < 0] = -np.inf
        scores_QT[matched_q] = scores
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
