"""Approximate search by one of FAISS's indices: trained once on a sample, then filled with rows a block at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from configs.reading import shown
from eval.exact_scores import best, exact_scores
from eval.search_device import Find, faiss_reason, has_gpu

BLOCK_BYTES = 64 << 20
SAMPLE_ROWS = 1 << 16  # at least, where there are as many
ROWS_PER_CENTROID = 64  # FAISS asks for 39 and takes no more than 256
TWO_LEVELS_FROM = 1 << 15  # coarse centroids from which k-means is done in two levels

RowsOf = Callable[[NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True)
class Trained:
    """An empty index that has been trained, for all ranks and blocks; `asked` names it in messages."""

    index: faiss.Index
    params: str
    asked: str

    def filled(self, rows_ND: NDArray[np.float32], first: int | None = None) -> faiss.Index:
        """A copy that holds rows; numbered from `first` on if given, which an IVF index alone can do."""
        index = faiss.clone_index(self.index)
        try:
            if first is None:
                index.add(rows_ND)
            else:
                index.add_with_ids(rows_ND, np.arange(first, first + len(rows_ND), dtype=np.int64))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{self.asked}: {faiss_reason(error)}") from error
        set_params(index, self.params, self.asked)
        return index


def sample_size(factory: str, size: int, num_rows: int, setting: str) -> int:
    """Rows that an index of `size` numbers is trained on, of `num_rows`. Raises ValueError as `train_index` does."""
    ivf = faiss.try_extract_index_ivf(_empty(factory, "", size, f"{setting} {factory!r}", setting))
    return min(num_rows, max(SAMPLE_ROWS, ROWS_PER_CENTROID * (ivf.nlist if ivf else 0)))


def train_index(
    factory: str, params: str, sample_SD: NDArray[np.float32], setting: str = "eval.faiss_index"
) -> Trained:
    """An index of FAISS's factory string, for inner products, trained on a sample.

    Raises ValueError naming `setting` and the string where FAISS does not know it or has too few rows to train it.
    """
    size = sample_SD.shape[1]
    asked = f"{setting} {factory!r} (faiss_params {params!r}) over {len(sample_SD)} x {size}"
    index = _empty(factory, params, size, asked, setting)
    try:
        _quiet(index)
        _train(index, sample_SD)
    except (RuntimeError, TypeError, MemoryError) as error:
        raise ValueError(f"{asked}: {faiss_reason(error)}") from error
    set_params(index, params, asked)
    return Trained(index, params, asked)


def search_index(
    find: Find,
    num_rows: int,
    queries_QD: NDArray[np.float32],
    k: int,
    rows_of: RowsOf,
    *,
    shortlist: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What an index finds, scored exactly: scores float64 [Q, k] and ids int64 [Q, k], by (score desc, id asc).

    It has `num_rows`. The first `shortlist` (at least k) that `find` gives are scored by their descriptors, which
    `rows_of` gives for ids; the k best of them stay. Where fewer are found the rest is (-inf, -1).
    """
    num_queries, wide = len(queries_QD), min(max(k, shortlist), max(1, num_rows))
    scores_Qk = np.full((num_queries, k), -np.inf)
    ids_Qk = np.full((num_queries, k), -1, dtype=np.int64)
    block = max(1, BLOCK_BYTES // (24 * wide * queries_QD.shape[1]))
    for start in range(0, num_queries, block):
        part = slice(start, start + block)
        _, found_PW = find(queries_QD[part], wide)
        is_found_PW = found_PW >= 0
        exact_PW = np.full(found_PW.shape, -np.inf)
        of_X = start + np.nonzero(is_found_PW)[0]
        exact_PW[is_found_PW] = exact_scores(queries_QD[of_X], rows_of(found_PW[is_found_PW]))
        scores, ids = best(exact_PW, found_PW, k)
        scores_Qk[part, : scores.shape[1]], ids_Qk[part, : ids.shape[1]] = scores, ids
    return scores_Qk, ids_Qk


def set_params(index: faiss.Index, params: str, asked: str) -> None:
    """Sets FAISS's search parameters, such as nprobe=32. Raises ValueError for those that the index has not."""
    if params:
        try:
            faiss.ParameterSpace().set_index_parameters(index, params)  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{asked}: {faiss_reason(error)}") from error


def check_strings(factory: str, params: str, setting: str = "eval.faiss_index") -> None:
    """Raises ValueError for strings that FAISS would end the process on, or not understand."""
    if not re.fullmatch(r"[\w,.()\[\]:+-]+", factory, re.ASCII) or re.search(r"(?<![\d.])0+(?![\d.])|\d{9}", factory):
        raise ValueError(f"{setting} {shown(factory)!r}: expected such as IVF1024,Flat, IVF1024,PQ64 or HNSW32")
    for one in filter(None, params.split(",")):
        if not re.fullmatch(r"\w+=0*[1-9]\d{0,8}", one, re.ASCII):
            raise ValueError(
                f"eval.faiss_params {shown(one)!r}: expected NAME=NUMBER, such as nprobe=32 or efSearch=64"
            )


def _empty(factory: str, params: str, size: int, asked: str, setting: str = "eval.faiss_index") -> faiss.Index:
    check_strings(factory, params, setting)
    try:
        return faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError, MemoryError) as error:
        raise ValueError(f"{asked}: {faiss_reason(error)}") from error


def _train(index: faiss.Index, sample_SD: NDArray[np.float32]) -> None:
    ivf: Any = faiss.try_extract_index_ivf(index)
    if ivf is not None and has_gpu():
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
    if ivf is not None and ivf.nlist >= TWO_LEVELS_FROM and isinstance(index, faiss.IndexIVF):
        from faiss.contrib.clustering import two_level_clustering

        centroids_CD, _ = two_level_clustering(sample_SD, int(ivf.nlist**0.5), int(ivf.nlist), spherical=True)
        ivf.quantizer.train(centroids_CD)
        ivf.quantizer.add(centroids_CD)
    index.train(sample_SD)
    if ivf is not None:
        ivf.clustering_index = None


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
