"""Photographs of a benchmark that cannot be read: how many may be, and what becomes of their places in a ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import BadImage

_NAMED = 3


def as_bad_images(paths: Sequence[Path], unreadable: Mapping[int, str]) -> list[BadImage]:
    """The photographs of these numbers, each with the reason."""
    return [BadImage("", 0, str(paths[number]), why) for number, why in sorted(unreadable.items())]


def ranked_without(
    predictions_QK: NDArray[np.int64],
    similarities_QK: NDArray[np.float32],
    database: Mapping[int, str],
    queries: Mapping[int, str],
    k: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first k of each ranking once unreadable database images are taken out of it; an unreadable query has none.

    -1 stands for none, as in the rankings themselves.
    """
    if not (database or queries):
        return predictions_QK[:, :k], similarities_QK[:, :k]
    left_out_QK = np.isin(predictions_QK, list(database))
    order_QK = np.argsort(left_out_QK, axis=1, kind="stable")[:, :k]
    found_QK = np.where(left_out_QK, -1, predictions_QK)
    similar_QK = np.where(left_out_QK, -np.inf, similarities_QK).astype(np.float32)
    found_QK, similar_QK = (np.take_along_axis(a_QK, order_QK, axis=1) for a_QK in (found_QK, similar_QK))
    none_Q = list(queries)
    found_QK[none_Q], similar_QK[none_Q] = -1, 0.0
    return found_QK, similar_QK


def unreadable_note(database: list[BadImage], queries: list[BadImage], num_database: int, num_queries: int) -> str:
    """What was left out and how it counts, the first ones by name; empty if all could be read."""
    told = []
    if queries:
        told.append(f"{len(queries)} of {num_queries} queries, which count as misses")
    if database:
        told.append(f"{len(database)} of {num_database} database images, which cannot be found")
    both = [*queries, *database]
    more = f"; and {len(both) - _NAMED} more" if len(both) > _NAMED else ""
    return f"unreadable: {'; '.join(told)} ({'; '.join(map(str, both[:_NAMED]))}{more})" if both else ""
