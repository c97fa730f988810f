"""Re-ranking by mutual nearest neighbours of local features (EffoVPR; RerankVPR)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.schema import RerankConfig
from eval.extract import Features, slice_bounds

QUERIES_PER_BLOCK = 16
SIMILARITIES_PER_BLOCK = 2**25  # float32 entries of the similarity matrices held at once: 128 MB


def mutual_matches(
    query_NC: torch.Tensor,
    query_salient_N: torch.Tensor,
    candidates_KNC: torch.Tensor,
    candidates_salient_KN: torch.Tensor,
    *,
    nn_match_thresh: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matches of a query's patches with those of each candidate, each candidate by itself.

    A match is a pair of mutual nearest neighbours by cosine among all patches, above `nn_match_thresh`, both
    patches salient. Features are L2-normalised. Returns for each query patch: whether it is matched (bool [K, N]),
    its nearest patch (int64 [K, N]) and their cosine (float32 [K, N]).
    """
    sim_KNM = torch.matmul(query_NC.float(), candidates_KNC.float().transpose(1, 2))
    best_KN, nearest_KN = sim_KNM.max(dim=2)
    back_KM = sim_KNM.argmax(dim=1)
    mutual_KN = back_KM.gather(1, nearest_KN) == torch.arange(len(query_NC), device=sim_KNM.device)
    both_KN = query_salient_N & candidates_salient_KN.gather(1, nearest_KN)
    return mutual_KN & (best_KN > nn_match_thresh) & both_KN, nearest_KN, best_KN


def match_scores(
    query_NC: torch.Tensor,
    query_salient_N: torch.Tensor,
    candidates_KNC: torch.Tensor,
    candidates_salient_KN: torch.Tensor,
    *,
    nn_match_thresh: float,
    score: str = "count",
) -> torch.Tensor:
    """Number of mutual matches with each candidate, or the sum of their cosines (float32 [K]); see `mutual_matches`."""
    step = max(1, SIMILARITIES_PER_BLOCK // (len(query_NC) * candidates_KNC.shape[1]))
    parts = []
    for start in range(0, len(candidates_KNC), step):
        block = slice(start, start + step)
        matched_KN, _, cosine_KN = mutual_matches(
            query_NC,
            query_salient_N,
            candidates_KNC[block],
            candidates_salient_KN[block],
            nn_match_thresh=nn_match_thresh,
        )
        value_KN = matched_KN.float() if score == "count" else cosine_KN * matched_KN
        parts.append(value_KN.sum(dim=1))
    return torch.cat(parts) if parts else query_NC.new_zeros(0, dtype=torch.float32)


def reorder(
    scores_QT: NDArray[np.float32],
    predictions_QK: NDArray[np.int64],
    similarities_QK: NDArray[np.float32],
    *,
    num_patches: int,
    global_weight: float,
) -> NDArray[np.int64]:
    """Predictions with the first T sorted by score, ties in first-stage order; the others stay behind them.

    With a global weight the key is score / patches + weight * global cosine.
    """
    depth = scores_QT.shape[1]
    key_QT = scores_QT.astype(np.float64)
    if global_weight:
        key_QT = key_QT / num_patches + global_weight * similarities_QK[:, :depth]
    order_QT = np.argsort(-key_QT, axis=1, kind="stable")
    head_QT = np.take_along_axis(predictions_QK[:, :depth], order_QT, axis=1)
    return np.concatenate([head_QT, predictions_QK[:, depth:]], axis=1)


@torch.inference_mode()
def rerank(
    queries: Features,
    database: Features,
    predictions_QK: NDArray[np.int64],
    similarities_QK: NDArray[np.float32],
    config: RerankConfig,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Re-ranked predictions [Q, K] and the match scores [Q, T] of the first T = top_k, equal on every rank.

    Database features stay on the rank that extracted them and queries travel in blocks: a rank scores the pairs whose
    candidate it holds, and the scores, each from exactly one rank, are summed over ranks.
    """
    assert queries.local_INC is not None
    assert queries.salient_IN is not None
    assert database.local_INC is not None
    assert database.salient_IN is not None
    world = dist.get_world_size()
    num_queries = len(predictions_QK)
    candidates_QT = predictions_QK[:, : config.top_k]
    scores_QT = torch.zeros(candidates_QT.shape, device=database.local_INC.device)
    stop = database.start + len(database.local_INC)
    for owner in range(world):
        first, last = slice_bounds(num_queries, owner, world)
        for begin in range(first, last, QUERIES_PER_BLOCK):
            block = range(begin, min(last, begin + QUERIES_PER_BLOCK))
            local_BNC, salient_BN = _broadcast_block(queries, block, owner)
            for i, query in enumerate(block):
                held_T = (candidates_QT[query] >= database.start) & (candidates_QT[query] < stop)
                rows = torch.from_numpy(candidates_QT[query][held_T] - database.start).to(scores_QT.device)
                scores_QT[query, torch.from_numpy(held_T).to(scores_QT.device)] = match_scores(
                    local_BNC[i],
                    salient_BN[i],
                    database.local_INC[rows],
                    database.salient_IN[rows],
                    nn_match_thresh=config.nn_match_thresh,
                    score=config.score,
                )
            if on_progress:
                on_progress(block.stop)
    dist.all_reduce(scores_QT)
    scores = scores_QT.cpu().numpy()
    ranked = reorder(
        scores,
        predictions_QK,
        similarities_QK,
        num_patches=database.local_INC.shape[1],
        global_weight=config.global_weight,
    )
    return ranked, scores


def _broadcast_block(queries: Features, block: range, owner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Local features and masks of a block of queries from the rank that extracted them."""
    assert queries.local_INC is not None
    assert queries.salient_IN is not None
    if dist.get_rank() == owner:
        part = slice(block.start - queries.start, block.stop - queries.start)
        local_BNC, salient_BN = queries.local_INC[part].contiguous(), queries.salient_IN[part].contiguous()
    else:
        local_BNC = queries.local_INC.new_empty(len(block), *queries.local_INC.shape[1:])
        salient_BN = queries.salient_IN.new_empty(len(block), *queries.salient_IN.shape[1:])
    dist.broadcast(local_BNC, owner)
    dist.broadcast(salient_BN, owner)
    return local_BNC, salient_BN
