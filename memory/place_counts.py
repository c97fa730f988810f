"""How many references of each place there are, known on the host so that nobody asks the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def references_of_places(place_ids_A: torch.Tensor, *reference_ids: torch.Tensor) -> NDArray[np.int64]:
    """How many references have the place of each anchor, int64 [A]; all ids on the host.

    The anchors of a place stand together as a rule: it is then looked up once.
    """
    ids_A = place_ids_A.numpy()
    if not len(ids_A):
        return np.zeros(0, dtype=np.int64)
    sorted_G = np.sort(np.concatenate([ids.numpy() for ids in reference_ids]))
    first_R = np.flatnonzero(np.diff(ids_A, prepend=ids_A[0] - 1))  # of each run of anchors of one place
    places_R = ids_A[first_R]
    count_R = np.searchsorted(sorted_G, places_R, "right") - np.searchsorted(sorted_G, places_R, "left")
    return np.repeat(count_R, np.diff(first_R, append=len(ids_A)))
