"""Frames of a video: each candidate is supported by what the frames before and after it found nearby."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.positions import Positions, metres_between
from eval.index.estimate import NEAR_M, taken
from eval.index.location import Found

REACH = 3  # frames before and after
NUMBERS_PER_FRAME = 2  # without positions: photographs of the index that lie so near in its order show one place


def smooth(found: Found, positions: Positions, reach: int = REACH) -> Found:
    """The candidates of each frame sorted by their own key and those of their neighbours' candidates nearby.

    To a candidate's key (the similarity where nothing was matched) frame t + d adds the largest key among its
    candidates near that one, divided by 1 + |d|, for 0 < |d| <= `reach`. Near is within 50 m times |d|; where a
    position is unknown, 2 |d| in the order of the index. What was not matched stays behind what was, in its order.
    Keys of the result are the sums.
    """
    ids_QK, count = found.ids_QK, len(found.ids_QK)
    keys_QK = np.where(np.isnan(found.keys_QK).all(axis=1, keepdims=True), found.similarities_QK, found.keys_QK)
    own_QK = np.where(np.isnan(keys_QK) | (ids_QK < 0), -np.inf, keys_QK)
    sums_QK = own_QK.copy()
    for frame in range(count):
        for other in range(max(0, frame - reach), min(count, frame + reach + 1)):
            if other == frame:
                continue
            steps = abs(other - frame)
            near_KK = _near(ids_QK[frame], ids_QK[other], positions, steps)
            best_K = np.where(near_KK, np.maximum(own_QK[other], 0.0)[None, :], 0.0).max(axis=1, initial=0.0)
            sums_QK[frame] += best_K / (1 + steps)
    order_QK = np.argsort(-sums_QK, axis=1, kind="stable")
    return replace(
        found,
        ids_QK=np.take_along_axis(ids_QK, order_QK, axis=1),
        similarities_QK=np.take_along_axis(found.similarities_QK, order_QK, axis=1),
        matches_QK=np.take_along_axis(found.matches_QK, order_QK, axis=1),
        keys_QK=np.take_along_axis(sums_QK, order_QK, axis=1),
    )


def _near(ids_K: NDArray[np.int64], others_K: NDArray[np.int64], positions: Positions, steps: int) -> NDArray[np.bool_]:
    """Which candidates of two frames so many steps apart show places near each other, bool [K, K]."""
    rows, columns = np.divmod(np.arange(len(ids_K) * len(others_K)), max(1, len(others_K)))
    mine, theirs = ids_K[rows], others_K[columns]
    metres = metres_between(taken(positions, np.maximum(mine, 0)), taken(positions, np.maximum(theirs, 0)))
    close = np.where(np.isnan(metres), np.abs(mine - theirs) <= NUMBERS_PER_FRAME * steps, metres <= NEAR_M * steps)
    return (close & (mine >= 0) & (theirs >= 0)).reshape(len(ids_K), len(others_K))
