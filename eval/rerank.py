"""Re-ranking by mutual nearest neighbours of local features (EffoVPR; RerankVPR), sharded over ranks by query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.progress import OnProgress, PartOf, untold
from configs.ranks import on_all_ranks
from configs.schema import RerankConfig
from eval.features import StoredFeatures
from eval.matching import match_scores
from eval.pairs import Candidates, pair_blocks


def fuse(
    scores_QT: NDArray[np.float32],
    similarities_QT: NDArray[np.float32],
    patches_Q: NDArray[np.float64] | NDArray[np.int64],
    global_weight: float,
) -> NDArray[np.float64]:
    """Keys that sort candidates: the score itself, or score / patches of the query + weight * global cosine.

    `patches_Q` is `patch_mass`.
    """
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
    pairs: Candidates, config: RerankConfig, device: torch.device, on_progress: OnProgress = untold
) -> NDArray[np.float32]:
    """Match scores [Q, T] of queries with their candidates, equal on every rank.

    Each score comes from one rank, so it is the same at any number of them.
    """
    share = dist.get_rank(), dist.get_world_size()
    with on_all_ranks():
        scores_QT = _scores(pairs, config, device, on_progress, share)
    dist.all_reduce(scores_QT)
    return scores_QT.cpu().numpy()


@torch.inference_mode()
def score_here(
    pairs: Candidates, config: RerankConfig, device: torch.device, on_progress: OnProgress = untold
) -> NDArray[np.float32]:
    """The same by this process alone; needs no process group."""
    return _scores(pairs, config, device, on_progress, (0, 1)).cpu().numpy()


def _scores(
    pairs: Candidates, config: RerankConfig, device: torch.device, on_progress: OnProgress, share: tuple[int, int]
) -> torch.Tensor:
    """Scores [Q, T] of the pairs that are this rank's by its `share` (rank, world size); 0 for the others."""
    scores_QT = torch.zeros(pairs.ids_QT.shape, device=device)
    for block in pair_blocks(pairs, config.memory_mb, device, on_progress, share):
        scores_QT[block.rows, block.columns] = match_scores(block.queries, block.candidates, config)
    return scores_QT


def patch_counts(features: StoredFeatures) -> NDArray[np.int64]:
    """Kept patches of every image."""
    return np.concatenate([np.asarray(shard["count"]) for shard in features.shards]).astype(np.int64)


def patch_mass(features: StoredFeatures, config: RerankConfig) -> NDArray[np.float64]:
    """What every image would score against itself, without geometry and cosines: its patches, or their saliency."""
    if config.match_weight == "none":
        return patch_counts(features).astype(np.float64)
    sums = []
    for number, shard in enumerate(features.shards):
        total = np.concatenate([np.zeros(1), np.cumsum(shard["saliency"], dtype=np.float64)])
        sums.append(np.diff(total[features.offsets(number)]))
    return np.concatenate(sums)


Score = Callable[..., NDArray[np.float32]]  # as `score_candidates`


@dataclass(frozen=True)
class Reranked:
    """Predictions after matching, match scores of the first T before it, and how much was matched.

    Scores of what was not matched, and of a candidate that is none, are NaN.
    """

    predictions_QK: NDArray[np.int64]
    scores_QT: NDArray[np.float32]
    num_left_alone: int  # queries without a match to make
    mean_depth: float  # candidates matched of a query


def rerank(
    queries: StoredFeatures,
    database: StoredFeatures,
    predictions_QK: NDArray[np.int64],
    similarities_QK: NDArray[np.float32],
    config: RerankConfig,
    device: torch.device,
    *,
    depth_Q: NDArray[np.int64] | None = None,
    on_progress: OnProgress = untold,
    score: Score = score_candidates,
) -> Reranked:
    """The first predictions of each query re-sorted; equal on every rank and at any number of ranks.

    `depth_Q` says how many of each query, at most top_k (see eval/depth.py); without it they are top_k. A query of
    one or none keeps its order. With `score_here` it is the work of this process alone.
    """
    depth, count = min(config.top_k, predictions_QK.shape[1]), len(predictions_QK)
    depth_Q = np.full(count, depth) if depth_Q is None else np.minimum(depth_Q, depth)
    depth_Q = np.where(depth_Q > 1, depth_Q, 0)
    scores_QT = np.full((count, depth), np.nan, dtype=np.float32)
    ranked_QK = predictions_QK.copy()
    matched = 0
    for rows, width in _of_like_depth(depth_Q, depth):
        candidates = predictions_QK[rows, :width]
        left_out = (candidates < 0) | (np.arange(width) >= depth_Q[rows, None])  # -1 stands for nothing found
        scores = score(
            Candidates(queries, rows, database, np.maximum(candidates, 0)),
            config,
            device,
            PartOf(on_progress, count, before=matched),
        )
        mass = patch_mass(queries, config)[rows]
        key = fuse(scores, similarities_QK[rows, :width], mass, config.global_weight)
        key[left_out] = -np.inf
        scores_QT[rows, :width] = np.where(left_out, np.float32(np.nan), scores)
        ranked_QK[rows] = reorder(key, predictions_QK[rows])
        matched += len(rows)
    return Reranked(ranked_QK, scores_QT, int((depth_Q == 0).sum()), float(depth_Q.mean()) if count else 0.0)


def _of_like_depth(depth_Q: NDArray[np.int64], most: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Queries whose depths fit widths of 2, 4, 8 ... `most`, with the width: pairs are matched in full rectangles."""
    width, below = 2, 1
    while below < most:
        width = min(width, most)
        rows = np.flatnonzero((depth_Q > below) & (depth_Q <= width))
        if len(rows):
            yield rows, width
        below, width = width, 2 * width


def margins(similarities_QK: NDArray[np.float32]) -> NDArray[np.float64]:
    """First-stage cosine of the first minus the second candidate; infinite where there is one."""
    if similarities_QK.shape[1] < 2:
        return np.full(len(similarities_QK), np.inf)
    return similarities_QK[:, 0].astype(np.float64) - similarities_QK[:, 1]
