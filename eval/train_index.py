"""One approximate index for all ranks: trained by rank 0 on a sample of the whole database."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from configs.ranks import from_rank_0
from eval.approximate import Trained, sample_size, train_index
from eval.features import StoredFeatures


def train_together(factory: str, params: str, database: StoredFeatures, setting: str = "eval.faiss_index") -> Trained:
    """The same trained index on every rank, which all call this. Raises ValueError as `train_index` does."""

    def train() -> tuple[NDArray[np.uint8], str]:
        trained = train_index(factory, params, sample_of(factory, database, setting), setting)
        return faiss.serialize_index(trained.index), trained.asked

    stored, asked = from_rank_0(train)
    return Trained(faiss.deserialize_index(stored), params, asked)


def sample_of(factory: str, database: StoredFeatures, setting: str) -> NDArray[np.float32]:
    """Descriptors [S, D], evenly spread over the database, that an index is trained on."""
    size = int(database.shards[0]["descriptors"].shape[1]) if database.shards else 1
    chosen = spread(len(database), sample_size(factory, size, len(database), setting))
    return database.rows(chosen)


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` of the numbers below `count`, or all, evenly spread and ascending."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64)
