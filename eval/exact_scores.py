"""Inner products that depend on their two vectors alone, and the order of what they score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def exact_scores(queries_XD: NDArray[np.float32], rows_XD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inner products [X] of pairs, summed in float64: the same whatever else is computed beside them."""
    return np.einsum("xd,xd->x", queries_XD.astype(np.float64), rows_XD.astype(np.float64))


def best(
    scores_QC: NDArray[np.float64], ids_QC: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The first k by (score desc, id asc) of each row; ids below 0 stand for nothing and come last."""
    scores_QC = np.where(ids_QC < 0, -np.inf, scores_QC)
    order_Qk = np.lexsort((ids_QC, -scores_QC), axis=-1)[:, :k]
    return np.take_along_axis(scores_QC, order_Qk, axis=1), np.take_along_axis(ids_QC, order_Qk, axis=1)
