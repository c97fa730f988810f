"""Inner-product search over rows that are spread over ranks and read in blocks; exact unless an index is named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import faiss
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import on_all_ranks
from configs.reading import shown

MARGIN = 16  # rows fetched past k at first
BLOCK_BYTES = 64 << 20

GPU_MAX_K = 2048  # FAISS's kernels select no more
SCRATCH_BYTES = 256 << 20  # of FAISS on a GPU, while it searches

Blocks = Iterable[tuple[int, NDArray[np.float32]]]
Find = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]


def search_rows(
    queries_QD: NDArray[np.float32],
    rows_ND: NDArray[np.float32],
    k: int,
    floor_Q: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k best rows of each query by (score desc, row asc): scores float64 [Q, k] and rows int64 [Q, k].

    FAISS finds candidates in float32, and more of them until none that it left out can reach the k-th place. Those
    that can are summed again in float64, pair by pair, so that scores depend neither on the other rows nor on the
    blocks of a matrix product. Rows that score less than `floor_Q`, such as the k-th best found elsewhere, may be left
    out. Where fewer than k rows are found the rest is (-inf, -1).
    """
    num_queries, num_rows = len(queries_QD), len(rows_ND)
    scores_Qk = np.full((num_queries, k), -np.inf)
    ids_Qk = np.full((num_queries, k), -1, dtype=np.int64)
    if not num_queries or not num_rows:
        return scores_Qk, ids_Qk
    floor_Q = np.full(num_queries, -np.inf) if floor_Q is None else floor_Q
    find = _flat(rows_ND)
    # A float32 dot product is off by at most D * 2^-24 |q| |r| to first order, in whatever order it is summed; two of
    # them change places within twice that.
    norms_Q = np.linalg.norm(queries_QD, axis=1)
    slack_Q = norms_Q * np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND).max()) * rows_ND.shape[1] * 2.0**-23
    pending, width = np.arange(num_queries), min(num_rows, k + MARGIN)
    while len(pending):
        still_open = []
        block = max(1, BLOCK_BYTES // (24 * width * rows_ND.shape[1]))
        for start in range(0, len(pending), block):
            part = pending[start : start + block]
            rough_PW, rows_PW = find(queries_QD[part], width)
            least_P = np.maximum(floor_Q[part], rough_PW[:, min(k, width) - 1]) - slack_Q[part]
            closed_P = (rough_PW[:, -1] < least_P) | (width == num_rows)  # no row that was not fetched can reach it
            still_open.append(part[~closed_P])
            keep_PW = (rough_PW >= least_P[:, None]) & closed_P[:, None]
            of_X = part[np.nonzero(keep_PW)[0]]
            exact_PW = np.full(rough_PW.shape, -np.inf)
            exact_PW[keep_PW] = _exact(queries_QD[of_X], rows_ND[rows_PW[keep_PW]])
            best = _best(exact_PW, np.where(keep_PW, rows_PW, -1), k)
            scores_Qk[part, : best[0].shape[1]], ids_Qk[part, : best[1].shape[1]] = best
        pending, width = np.concatenate(still_open), min(num_rows, 4 * width)
    return scores_Qk, ids_Qk


def search_approximately(
    queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int, factory: str, params: str = ""
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What an index of FAISS's factory string finds, trained on these rows, with exact scores; see `search_rows`.

    Raises ValueError naming the string where FAISS does not know it or has too few rows to train it.
    """
    num_queries = len(queries_QD)
    scores_Qk = np.full((num_queries, k), -np.inf)
    ids_Qk = np.full((num_queries, k), -1, dtype=np.int64)
    if not num_queries or not len(rows_ND):
        return scores_Qk, ids_Qk
    _check_strings(factory, params)
    try:
        index = faiss.index_factory(rows_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        _quiet(index)
        index.train(rows_ND)
        if params:
            faiss.ParameterSpace().set_index_parameters(index, params)  # type: ignore[arg-type]
        index.add(rows_ND)
    except (RuntimeError, TypeError, MemoryError) as error:
        asked = f"eval.faiss_index {factory!r} (faiss_params {params!r}) over {len(rows_ND)} x {rows_ND.shape[1]}"
        raise ValueError(f"{asked}: {_reason(error)}") from error
    find = _on_gpu(index, rows_ND.nbytes, index.search)
    block = max(1, BLOCK_BYTES // (24 * k * rows_ND.shape[1]))
    for start in range(0, num_queries, block):
        part = slice(start, start + block)
        _, found_Pk = find(queries_QD[part], k)
        is_found_Pk = found_Pk >= 0
        exact_Pk = np.full(found_Pk.shape, -np.inf)
        of_X = start + np.nonzero(is_found_Pk)[0]
        exact_Pk[is_found_Pk] = _exact(queries_QD[of_X], rows_ND[found_Pk[is_found_Pk]])
        scores_Qk[part], ids_Qk[part] = _best(exact_Pk, found_Pk, k)
    return scores_Qk, ids_Qk


def _exact(queries_XD: NDArray[np.float32], rows_XD: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.einsum("xd,xd->x", queries_XD.astype(np.float64), rows_XD.astype(np.float64))


def _flat(rows_ND: NDArray[np.float32]) -> Find:
    """FAISS's exact search over rows where they lie, or over a copy of them on this rank's GPU."""

    def on_cpu(queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, ids = faiss.knn(queries_QD, rows_ND, k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, ids

    return _on_gpu(faiss.IndexFlatIP(rows_ND.shape[1]), rows_ND.nbytes, on_cpu, rows_ND)


def _has_gpu() -> bool:
    return bool(torch.cuda.is_available() and getattr(faiss, "get_num_gpus", lambda: 0)())


def _on_gpu(index: faiss.Index, num_bytes: int, on_cpu: Find, rows_ND: NDArray[np.float32] | None = None) -> Find:
    """The search of a copy of an index, and of `rows_ND` added to it, on this rank's GPU; `on_cpu` without one.

    Where FAISS cannot (an HNSW, too little memory beside a training, k above 2,048) the CPU searches, and a warning
    says why. The copy and FAISS's scratch memory are freed with the function that is returned.
    """
    if not _has_gpu():
        return on_cpu
    torch.cuda.empty_cache()  # what torch keeps free of a training is free for FAISS
    free, _ = torch.cuda.mem_get_info()
    needed = num_bytes + 2 * SCRATCH_BYTES
    if free < needed:
        _warn(f"{free / 2**30:.1f} GB of the GPU are free, the index needs {needed / 2**30:.1f}")
        return on_cpu
    try:
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(SCRATCH_BYTES)  # by itself it takes 1.5 GiB
        copy = faiss.index_cpu_to_gpu(resources, torch.cuda.current_device(), index)
        if rows_ND is not None:
            copy.add(rows_ND)
    except RuntimeError as error:
        _warn(_reason(error))
        return on_cpu

    def find(queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if k > GPU_MAX_K:
            _warn(f"k {k} is above {GPU_MAX_K}, FAISS's most on a GPU")
            return on_cpu(queries_QD, k)
        try:
            scores, ids = copy.search(queries_QD, k)
        except RuntimeError as error:
            _warn(_reason(error))
            return on_cpu(queries_QD, k)
        return scores, ids

    return find


def _warn(reason: str) -> None:
    warnings.warn(f"rank {dist.get_rank()} searches on the CPU: {reason}", RuntimeWarning, stacklevel=3)


def _reason(error: Exception) -> str:
    """What FAISS says, without the C++ around it: signature, source line and failed expression."""
    text = " ".join(str(error).split())
    text = re.sub(r"^Error in .*? at \S+:\d+: ", "", text)
    text = re.sub(r"^Error: ?", "", text)
    return re.sub(r"^'.*?' failed:? ?", "", text)[:300] or text[:300]


def _check_strings(factory: str, params: str) -> None:
    """Raises ValueError for strings that FAISS would end the process on, or not understand."""
    if not re.fullmatch(r"[\w,.()\[\]:+-]+", factory, re.ASCII) or re.search(r"(?<![\d.])0+(?![\d.])|\d{9}", factory):
        raise ValueError(f"eval.faiss_index {shown(factory)!r}: expected such as IVF1024,Flat, IVF1024,PQ64 or HNSW32")
    for one in filter(None, params.split(",")):
        if not re.fullmatch(r"\w+=0*[1-9]\d{0,8}", one, re.ASCII):
            raise ValueError(
                f"eval.faiss_params {shown(one)!r}: expected NAME=NUMBER, such as nprobe=32 or efSearch=64"
            )


def _quiet(index: faiss.Index) -> None:
    """Keeps FAISS from a warning for each clustering of few points: hundreds; `index_agreement` says what it costs."""
    parts: list[Any] = [index, faiss.try_extract_index_ivf(index)]
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a C++ vector, whatever its annotation says
        for number in range(chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(number))
            if isinstance(transform, faiss.OPQMatrix):
                transform.pq = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
                parts.append(transform)
        parts.append(faiss.downcast_index(index.index))
    for part in [*parts, *(getattr(one, "pq", None) for one in parts)]:
        clustering = getattr(part, "cp", None)
        if clustering is not None:
            clustering.min_points_per_centroid = 1


def _best(
    scores_QC: NDArray[np.float64], ids_QC: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The first k by (score desc, id asc) of each row; ids below 0 stand for nothing and come last."""
    scores_QC = np.where(ids_QC < 0, -np.inf, scores_QC)
    order_Qk = np.lexsort((ids_QC, -scores_QC), axis=-1)[:, :k]
    return np.take_along_axis(scores_QC, order_Qk, axis=1), np.take_along_axis(ids_QC, order_Qk, axis=1)


def search_blocks(
    queries_QD: NDArray[np.float32], blocks: Blocks, k: int, factory: str = "Flat", params: str = ""
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k best rows of all blocks (first id, rows), of which one at a time is held; `Flat` equals one exact index."""
    scores_Qk = np.full((len(queries_QD), k), -np.inf)
    ids_Qk = np.full((len(queries_QD), k), -1, dtype=np.int64)
    for first, rows_ND in blocks:
        if factory == "Flat":
            scores, ids = search_rows(queries_QD, rows_ND, k, scores_Qk[:, -1])
        else:
            scores, ids = search_approximately(queries_QD, rows_ND, k, factory, params)
        del rows_ND  # before the next block is made
        ids[ids >= 0] += first
        found = int((ids >= 0).sum(axis=1).max(initial=0))
        if found:
            both_Qk = np.concatenate([scores_Qk, scores[:, :found]], axis=1)
            scores_Qk, ids_Qk = _best(both_Qk, np.concatenate([ids_Qk, ids[:, :found]], axis=1), k)
    return scores_Qk, ids_Qk


def search_ranks(
    queries_QD: NDArray[np.float32], blocks: Blocks, k: int, factory: str = "Flat", params: str = ""
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best rows over all ranks: scores float32 [Q, k] and row numbers int64 [Q, k], equal on every rank.

    Every rank gives the same queries and its own blocks of rows. With `Flat` the answer equals `search_rows` on all
    rows together, in ids and in scores. Where the database has fewer than k rows the rest is (-inf, -1).
    """
    with on_all_ranks():
        scores_Qk, ids_Qk = search_blocks(queries_QD, blocks, k, factory, params)
    all_scores, all_ids = _gather(scores_Qk), _gather(ids_Qk)
    scores, ids = _best(np.concatenate(all_scores, axis=1), np.concatenate(all_ids, axis=1), k)
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
