"""How many candidates of a query are matched, learned on the database alone: no query, no label.

A spread of the database's images are queries against all others, re-ranked to the full depth. `adaptive` (the idea of
FoL++, arXiv 2604.22390: a pool of candidates sized by the first stage) takes two numbers from them, as `DepthRule`
says; `auto` takes the least margin from which on matching never changed the first candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import on_all_ranks
from configs.schema import RerankConfig
from eval.features import StoredFeatures
from eval.pairs import Candidates
from eval.rerank import fuse, margins, patch_mass, score_candidates
from eval.search import search_ranks

SAMPLE = 128
AT_LEAST = 20  # fewer images than this teach nothing
SURE, REACH = 0.5, 0.9  # quantiles, of the first candidates' cosines and of the steps down


@dataclass(frozen=True)
class DepthRule:
    """Candidates are matched whose cosine is within `reach` of the first one's, all if that is below `sure`.

    A first stage that is less sure of a query than of half of the database's images says little by its cosines.
    """

    sure: float
    reach: float

    def depths(self, similarities_QK: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
        """Candidates to match of each query [Q], from 1 to `top_k`."""
        cosine_QT = similarities_QK[:, :top_k].astype(np.float64)
        with np.errstate(invalid="ignore"):  # what was not found has a cosine of minus infinity
            within_Q = (cosine_QT[:, :1] - cosine_QT <= self.reach).sum(axis=1)
        return np.where(cosine_QT[:, 0] < self.sure, cosine_QT.shape[1], within_Q).astype(np.int64)


@dataclass(frozen=True)
class OwnImages:
    """Images of a database as queries against all others: cosines [S, T] as retrieved, and keys after matching."""

    similarities_ST: NDArray[np.float32]
    key_ST: NDArray[np.float64]


def match_own_images(
    database: StoredFeatures, config: RerankConfig, device: torch.device, block_bytes: int
) -> OwnImages | None:
    """Up to SAMPLE images of a database, spread over it; None if it is too small. Every rank must call this."""
    k = min(config.top_k + 1, len(database))
    sample_S = np.unique(np.linspace(0, len(database) - 1, min(SAMPLE, len(database))).astype(np.int64))
    if k < 3:
        return None
    with on_all_ranks():
        queries_SD = np.concatenate([database.descriptors(i, i + 1) for i in sample_S])
    similarities_SK, ids_SK = search_ranks(queries_SD, _own_blocks(database, block_bytes), k)
    others = [(ids != i) & (np.cumsum(ids != i) < k) for i, ids in zip(sample_S, ids_SK, strict=True)]
    ids_ST = np.stack([ids[keep] for ids, keep in zip(ids_SK, others, strict=True)])
    similarities_ST = np.stack([cos[keep] for cos, keep in zip(similarities_SK, others, strict=True)])
    scores_ST = score_candidates(Candidates(database, sample_S, database, ids_ST), config, device)
    key_ST = fuse(scores_ST, similarities_ST, patch_mass(database, config)[sample_S], config.global_weight)
    return OwnImages(similarities_ST, key_ST)


def depth_rule(own: OwnImages | None) -> DepthRule:
    """The rule that these images teach; one that matches all candidates of every query if they are too few.

    `reach` is the REACH quantile of the steps down in cosine, from the first candidate as retrieved to the first after
    matching; `sure` the SURE quantile of the first candidates' cosines. docs/evaluation.md says how both were chosen.
    """
    if own is None or len(own.similarities_ST) < AT_LEAST:
        return DepthRule(np.inf, np.inf)
    cosine_ST = own.similarities_ST.astype(np.float64)
    first_S = own.key_ST.argmax(axis=1)
    steps_S = cosine_ST[:, 0] - np.take_along_axis(cosine_ST, first_S[:, None], axis=1)[:, 0]
    return DepthRule(sure=float(np.quantile(cosine_ST[:, 0], SURE)), reach=float(np.quantile(steps_S, REACH)))


def margin_rule(own: OwnImages | None) -> float:
    """The least first-stage margin from which on matching never changed the first candidate; infinite without any."""
    if own is None:
        return np.inf
    return margin_from(margins(own.similarities_ST), own.key_ST.argmax(axis=1) != 0)


def margin_from(margin_S: NDArray[np.float64], changed_S: NDArray[np.bool_]) -> float:
    """The least margin above every margin of an image whose first candidate changed; infinite if too few lie above."""
    worst = float(margin_S[changed_S].max(initial=-np.inf))
    above = margin_S[margin_S > worst]
    return float(above.min()) if len(above) >= AT_LEAST else float("inf")


def _own_blocks(database: StoredFeatures, block_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    return database.blocks(dist.get_rank(), dist.get_world_size(), block_bytes)
