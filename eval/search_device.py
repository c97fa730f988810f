"""FAISS on this process's GPU where there is one and it fits, else on the CPU."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

GPU_MAX_K = 2048  # FAISS's kernels select no more
SCRATCH_BYTES = 256 << 20  # of FAISS on a GPU, while it searches

Find = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]


def flat(rows_ND: NDArray[np.float32]) -> Find:
    """FAISS's exact search over rows where they lie, or over a copy of them on this rank's GPU."""

    def on_cpu(queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, ids = faiss.knn(queries_QD, rows_ND, k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, ids

    return on_gpu(faiss.IndexFlatIP(rows_ND.shape[1]), rows_ND.nbytes, on_cpu, rows_ND)


def has_gpu() -> bool:
    """Whether torch and FAISS both see a GPU."""
    return bool(torch.cuda.is_available() and getattr(faiss, "get_num_gpus", lambda: 0)())


def on_gpu(index: faiss.Index, num_bytes: int, on_cpu: Find, rows_ND: NDArray[np.float32] | None = None) -> Find:
    """The search of a copy of an index, and of `rows_ND` added to it, on this rank's GPU; `on_cpu` without one.

    Where FAISS cannot (an HNSW, too little memory beside a training, k above 2,048) the CPU searches, and a warning
    says why. The copy and FAISS's scratch memory are freed with the function that is returned.
    """
    if not has_gpu():
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
        _warn(faiss_reason(error))
        return on_cpu

    def find(queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if k > GPU_MAX_K:
            _warn(f"k {k} is above {GPU_MAX_K}, FAISS's most on a GPU")
            return on_cpu(queries_QD, k)
        try:
            scores, ids = copy.search(queries_QD, k)
        except RuntimeError as error:
            _warn(faiss_reason(error))
            return on_cpu(queries_QD, k)
        return scores, ids

    return find


def _warn(reason: str) -> None:
    rank = os.environ.get("RANK", "0")
    warnings.warn(f"rank {rank} searches on the CPU: {reason}", RuntimeWarning, stacklevel=3)


def faiss_reason(error: Exception) -> str:
    """What FAISS says, without the C++ around it: signature, source line and failed expression."""
    text = " ".join(str(error).split())
    text = re.sub(r"^Error in .*? at \S+:\d+: ", "", text)
    text = re.sub(r"^Error: ?", "", text)
    return re.sub(r"^'.*?' failed:? ?", "", text)[:300] or text[:300]
