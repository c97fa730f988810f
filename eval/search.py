"""Exact inner-product search over rows that are spread over ranks, equal to one flat index."""

from __future__ import annotations

import faiss
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

MARGIN = 16  # rows fetched past k at first
BLOCK_BYTES = 64 << 20


def search_rows(
    queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k best rows of each query by (score desc, row asc): scores float64 [Q, k] and rows int64 [Q, k].

    FAISS finds candidates, and more of them until none that it left out can reach the k-th place. Their scores are
    summed again in float64, pair by pair, so that they depend neither on the other rows nor on the blocks of a matrix
    product.
    Where fewer than k rows exist the rest is (-inf, -1).
    """
    num_queries, num_rows = len(queries_QD), len(rows_ND)
    scores_Qk = np.full((num_queries, k), -np.inf)
    ids_Qk = np.full((num_queries, k), -1, dtype=np.int64)
    if not num_queries or not num_rows:
        return scores_Qk, ids_Qk
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    index.add(rows_ND)
    # A float32 dot product is off by at most D * 2^-24 |q| |r| to first order, in whatever order it is summed.
    norms_Q = np.linalg.norm(queries_QD, axis=1)
    slack_Q = norms_Q * np.linalg.norm(rows_ND, axis=1).max() * rows_ND.shape[1] * 2.0**-23
    pending, width = np.arange(num_queries), min(num_rows, k + MARGIN)
    while len(pending):
        still_open = []
        block = max(1, BLOCK_BYTES // (8 * width * rows_ND.shape[1]))
        for start in range(0, len(pending), block):
            part = pending[start : start + block]
            rough_PW, rows_PW = index.search(queries_QD[part], width)
            exact_PW = np.einsum("qd,qwd->qw", queries_QD[part].astype(np.float64), rows_ND[rows_PW].astype(np.float64))
            scores_Pk, ids_Pk = _best(exact_PW, rows_PW, k)
            scores_Qk[part, : scores_Pk.shape[1]], ids_Qk[part, : ids_Pk.shape[1]] = scores_Pk, ids_Pk
            if width < num_rows:  # could a row that was not fetched reach the k-th place?
                still_open.append(part[rough_PW[:, -1] + slack_Q[part] >= scores_Pk[:, -1]])
        pending, width = np.concatenate(still_open) if still_open else pending[:0], min(num_rows, 4 * width)
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

    Every rank gives the same queries and its own rows, numbered from `first_row`; the answer equals `search_rows` on
    all rows together, in ids and in scores. Where the database has fewer than k rows the rest is (-inf, -1).
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
