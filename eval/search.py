"""Exact inner-product search over rows that are spread over ranks, equal to one flat index."""

from __future__ import annotations

import faiss
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

# Rows fetched past k: a tie at the k-th place is settled among them, or by scoring every row.
MARGIN = 16
# float32 scores of unit vectors from a matrix product differ by less than this from the exact ones (D up to 65,536).
ROUNDING = 1e-5
BLOCK = 64


def search_rows(
    queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k best rows of each query by (score desc, row asc): scores float64 [Q, k] and rows int64 [Q, k].

    FAISS finds candidates; their scores are summed again in float64, pair by pair, so that they depend neither on the
    other rows nor on the block sizes of a matrix product. Where fewer than k rows exist the rest is (-inf, -1).
    """
    num_queries, num_rows = len(queries_QD), len(rows_ND)
    scores_Qk = np.full((num_queries, k), -np.inf)
    ids_Qk = np.full((num_queries, k), -1, dtype=np.int64)
    if not num_queries or not num_rows:
        return scores_Qk, ids_Qk
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    index.add(rows_ND)
    fetched = min(num_rows, k + MARGIN)
    rough_QF, candidates_QF = index.search(queries_QD, fetched)
    for start in range(0, num_queries, BLOCK):
        block = slice(start, start + BLOCK)
        exact_BF = np.einsum(
            "qd,qfd->qf", queries_QD[block].astype(np.float64), rows_ND[candidates_QF[block]].astype(np.float64)
        )
        top_scores, top_ids = _best(exact_BF, candidates_QF[block], k)
        scores_Qk[block, : top_scores.shape[1]], ids_Qk[block, : top_ids.shape[1]] = top_scores, top_ids
    if fetched < num_rows:
        # A row that was not fetched may tie with the k-th one: score all rows for such a query.
        for query in np.flatnonzero(rough_QF[:, k - 1] - rough_QF[:, -1] <= ROUNDING):
            exact_1N = np.einsum("d,nd->n", queries_QD[query].astype(np.float64), rows_ND.astype(np.float64))[None]
            top_scores, top_ids = _best(exact_1N, np.arange(num_rows)[None], k)
            scores_Qk[query], ids_Qk[query] = top_scores[0], top_ids[0]
    return scores_Qk, ids_Qk


def _best(
    scores_QC: NDArray[np.float64], ids_QC: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The first k by (score desc, id asc) of each row; ids below 0 stand for nothing and come last."""
    scores_QC = np.where(ids_QC < 0, -np.inf, scores_QC)
    order_Qk = np.lexsort((ids_QC, -scores_QC), axis=-1)[:, :k]
    return np.take_along_axis(scores_QC, order_Qk, axis=1), np.take_along_axis(ids_QC, order_Qk, axis=1)


def search_ranks(
    queries_QD: torch.Tensor, rows_ND: torch.Tensor, first_row: int, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best rows over all ranks: scores float32 [Q, k] and global row numbers int64 [Q, k], equal on every rank.

    Every rank gives the same queries and its own rows, numbered from `first_row`; the answer equals `search_rows` on all
    rows together, in ids and in scores. Where the database has fewer than k rows the rest is (-inf, -1).
    """
    scores_Qk, ids_Qk = search_rows(queries_QD.cpu().numpy(), rows_ND.cpu().numpy(), k)
    ids_Qk[ids_Qk >= 0] += first_row
    all_scores = _gather(torch.from_numpy(scores_Qk), rows_ND.device)
    all_ids = _gather(torch.from_numpy(ids_Qk), rows_ND.device)
    scores, ids = _best(np.concatenate(all_scores, axis=1), np.concatenate(all_ids, axis=1), k)
    return scores.astype(np.float32), ids


def _gather(local: torch.Tensor, device: torch.device) -> list[np.ndarray]:
    local = local.to(device)
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return [part.cpu().numpy() for part in parts]


def gather_slices(local_ID: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows of all ranks in rank order, of which rank r gives counts[r]."""
    padded = local_ID.new_zeros(max(counts), *local_ID.shape[1:])
    padded[: len(local_ID)] = local_ID
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
