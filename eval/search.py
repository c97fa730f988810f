"""Inner-product search over rows that are spread over ranks and read in blocks; exact unless an index is given."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import on_all_ranks
from eval.approximate import BLOCK_BYTES, Trained, search_index
from eval.exact_scores import best, exact_scores
from eval.search_device import flat, on_gpu

MARGIN = 16  # rows fetched past k at first


class Rows:
    """Rows that are searched more than once: what the search needs of them is found once."""

    def __init__(self, rows_ND: NDArray[np.float32]) -> None:
        self.rows_ND = rows_ND
        self.find = flat(rows_ND)
        self.longest = float(np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND).max())) if len(rows_ND) else 0.0

    def __len__(self) -> int:
        return len(self.rows_ND)


Blocks = Iterable[tuple[int, "NDArray[np.float32] | Rows"]]


def search_rows(
    queries_QD: NDArray[np.float32],
    rows: NDArray[np.float32] | Rows,
    k: int,
    floor_Q: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k best rows of each query by (score desc, row asc): scores float64 [Q, k] and rows int64 [Q, k].

    FAISS finds candidates in float32, and more of them until none that it left out can reach the k-th place. Those
    that can are summed again in float64, pair by pair, so that scores depend neither on the other rows nor on the
    blocks of a matrix product. Rows that score less than `floor_Q`, such as the k-th best found elsewhere, may be left
    out. Where fewer than k rows are found the rest is (-inf, -1).
    """
    num_queries, num_rows = len(queries_QD), len(rows)
    scores_Qk = np.full((num_queries, k), -np.inf)
    ids_Qk = np.full((num_queries, k), -1, dtype=np.int64)
    if not num_queries or not num_rows:
        return scores_Qk, ids_Qk
    floor_Q = np.full(num_queries, -np.inf) if floor_Q is None else floor_Q
    rows = rows if isinstance(rows, Rows) else Rows(rows)
    rows_ND = rows.rows_ND
    # A float32 dot product is off by at most D * 2^-24 |q| |r| to first order, in whatever order it is summed; two of
    # them change places within twice that.
    norms_Q = np.linalg.norm(queries_QD, axis=1)
    slack_Q = norms_Q * rows.longest * rows_ND.shape[1] * 2.0**-23
    pending, width = np.arange(num_queries), min(num_rows, k + MARGIN)
    while len(pending):
        still_open = []
        block = max(1, BLOCK_BYTES // (24 * width * rows_ND.shape[1]))
        for start in range(0, len(pending), block):
            part = pending[start : start + block]
            rough_PW, rows_PW = rows.find(queries_QD[part], width)
            least_P = np.maximum(floor_Q[part], rough_PW[:, min(k, width) - 1]) - slack_Q[part]
            closed_P = (rough_PW[:, -1] < least_P) | (width == num_rows)  # no row that was not fetched can reach it
            still_open.append(part[~closed_P])
            keep_PW = (rough_PW >= least_P[:, None]) & closed_P[:, None]
            of_X = part[np.nonzero(keep_PW)[0]]
            exact_PW = np.full(rough_PW.shape, -np.inf)
            exact_PW[keep_PW] = exact_scores(queries_QD[of_X], rows_ND[rows_PW[keep_PW]])
            first = best(exact_PW, np.where(keep_PW, rows_PW, -1), k)
            scores_Qk[part, : first[0].shape[1]], ids_Qk[part, : first[1].shape[1]] = first
        pending, width = np.concatenate(still_open), min(num_rows, 4 * width)
    return scores_Qk, ids_Qk


def search_blocks(
    queries_QD: NDArray[np.float32], blocks: Blocks, k: int, trained: Trained | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k best rows of all blocks (first id, rows), held one at a time; exact unless an index is given."""
    scores_Qk = np.full((len(queries_QD), k), -np.inf)
    ids_Qk = np.full((len(queries_QD), k), -1, dtype=np.int64)
    for first, rows in blocks:
        if trained is None:
            scores, ids = search_rows(queries_QD, rows, k, scores_Qk[:, -1])
        else:
            scores, ids = _search_approximately(queries_QD, rows, k, trained)
        del rows  # before the next block is made
        ids[ids >= 0] += first
        found = int((ids >= 0).sum(axis=1).max(initial=0))
        if found:
            both_Qk = np.concatenate([scores_Qk, scores[:, :found]], axis=1)
            scores_Qk, ids_Qk = best(both_Qk, np.concatenate([ids_Qk, ids[:, :found]], axis=1), k)
    return scores_Qk, ids_Qk


def _search_approximately(
    queries_QD: NDArray[np.float32], rows: NDArray[np.float32] | Rows, k: int, trained: Trained
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rows_ND = rows.rows_ND if isinstance(rows, Rows) else rows
    if not len(queries_QD) or not len(rows_ND):
        return np.full((len(queries_QD), k), -np.inf), np.full((len(queries_QD), k), -1, dtype=np.int64)
    index = trained.filled(rows_ND)
    find = on_gpu(index, rows_ND.nbytes, index.search)
    return search_index(find, len(rows_ND), queries_QD, k, lambda ids: rows_ND[ids])


def search_ranks(
    queries_QD: NDArray[np.float32], blocks: Blocks, k: int, trained: Trained | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best rows over all ranks: scores float32 [Q, k] and row numbers int64 [Q, k], equal on every rank.

    Every rank gives the same queries and its own blocks of rows. Without an index the answer equals `search_rows` on
    all rows together, in ids and in scores; with one (the same on every rank) each block is searched in a copy of it.
    Where the database has fewer than k rows the rest is (-inf, -1).
    """
    with on_all_ranks():
        scores_Qk, ids_Qk = search_blocks(queries_QD, blocks, k, trained)
    all_scores, all_ids = _gather(scores_Qk), _gather(ids_Qk)
    scores, ids = best(np.concatenate(all_scores, axis=1), np.concatenate(all_ids, axis=1), k)
    return scores.astype(np.float32), ids


def _gather(local: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(local).to(device)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return [part.cpu().numpy() for part in parts]


def agreement(found_Qk: NDArray[np.int64], exact_Qk: NDArray[np.int64]) -> float:
    """Share in percent of the exact neighbours that an index found."""
    hits = [np.isin(exact, found).mean() for found, exact in zip(found_Qk, exact_Qk, strict=True)]
    return 100.0 * float(np.mean(hits)) if hits else 100.0
