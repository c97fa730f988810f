"""Whether to believe a location: how far the best candidate stands out, held against what the database itself teaches.

A photograph of a place that the index does not hold still has a best candidate. Its confidence is the matches of that
candidate minus the median of all re-ranked ones, as a share of the query's patches: the median is what photographs of
this kind match by chance. Without local features it is the same difference of similarities, which tells far less.

The threshold is learned without labels, on the database alone: some of its photographs are queries, and those that may
show their place are left out of the search, so that each is a photograph of a place that the index does not hold. At
`LEVEL` of them the threshold lies. What may show a photograph's place is what stands near it; without positions, what
lies near it in the order of the index, which is taken for that of a walk. How near is found too: the reach is doubled
until that lowers the threshold by no more than `STEADY`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.ranks import from_rank_0
from configs.schema import RerankConfig
from data_pipeline.positions import Positions, within_radius
from eval.features import StoredFeatures
from eval.index.estimate import taken
from eval.pairs import Candidates
from eval.rerank import Score, fuse, patch_counts, patch_mass, score_candidates
from eval.train_index import spread

LEVEL = 0.98
SAMPLE = 200
AT_LEAST = 20  # fewer photographs teach nothing
STEADY = 1.25
REACHES_M = (50.0, 100.0, 200.0, 400.0)
REACHES = (10, 20, 40, 80, 160, 320, 640)  # photographs before and after, without positions
WITHOUT_MATCHING = 30  # candidates whose median similarity counts, where nothing is matched
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """What was learned: from `threshold` on a photograph is taken to be of the map."""

    threshold: float
    sample: int
    apart: str  # what was left out of the search around each: "100 m", "20 photographs"


def confidence(matches_T: NDArray[np.floating[Any]], similarities_T: NDArray[np.floating[Any]], patches: int) -> float:
    """How far the first candidate stands out, 0 to 1; NaN without candidates. What was not matched is NaN."""
    matched = np.isfinite(matches_T)
    if matched.any():
        return float(matches_T[matched][0] - np.median(matches_T[matched])) / max(1, patches)
    if not len(similarities_T):
        return float("nan")
    first = similarities_T[:WITHOUT_MATCHING].astype(np.float64)
    return float(first[0] - np.median(first))


def learn(
    features: StoredFeatures,
    positions: Positions,
    config: RerankConfig,
    device: torch.device,
    *,
    score: Score = score_candidates,
) -> Verdict | None:
    """The threshold that a database teaches; None where it is too small. Every rank of the process group calls this."""
    count = len(features)
    by_place = bool(positions.known.mean() > 0.5) if count else False
    reaches: Sequence[float] = REACHES_M if by_place else [reach for reach in REACHES if 3 * reach <= count]
    usable = np.flatnonzero(positions.known) if by_place else np.arange(count)
    sample_S = usable[spread(len(usable), SAMPLE)]
    best: tuple[float, float, int] | None = None
    for reach in reaches:
        find = partial(_nearest_apart, features, positions, sample_S, reach, config, by_place=by_place)
        candidates_ST, similarities_ST = from_rank_0(find)
        full_S = (candidates_ST >= 0).all(axis=1)
        if candidates_ST.shape[1] < 2 or full_S.sum() < AT_LEAST:
            break
        rows_S, ids_ST, cosines_ST = sample_S[full_S], candidates_ST[full_S], similarities_ST[full_S]
        told = _confidences(features, rows_S, ids_ST, cosines_ST, config, device, score)
        threshold = float(np.quantile(told, LEVEL))
        if best is not None and best[0] <= STEADY * threshold:
            break
        best = threshold, reach, len(rows_S)
    if best is None:
        return None
    threshold, reach, size = best
    return Verdict(threshold, size, f"{reach:g} m" if by_place else f"{reach:g} photographs")


def _confidences(
    features: StoredFeatures,
    rows_S: NDArray[np.int64],
    ids_ST: NDArray[np.int64],
    cosines_ST: NDArray[np.float32],
    config: RerankConfig,
    device: torch.device,
    score: Score,
) -> NDArray[np.float64]:
    if not config.enabled:
        return np.array([confidence(np.zeros(0), row, 0) for row in cosines_ST])
    scores_ST = score(Candidates(features, rows_S, features, ids_ST), config, device)
    patches_S = patch_counts(features)[rows_S]
    keys_ST = fuse(scores_ST, cosines_ST, patch_mass(features, config)[rows_S], config.global_weight)
    order_ST = np.argsort(-keys_ST, axis=1, kind="stable")
    sorted_ST = np.take_along_axis(scores_ST, order_ST, axis=1)
    return np.array([confidence(row, row, int(n)) for row, n in zip(sorted_ST, patches_S, strict=True)])


def _nearest_apart(
    features: StoredFeatures,
    positions: Positions,
    sample_S: NDArray[np.int64],
    reach: float,
    config: RerankConfig,
    *,
    by_place: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest photographs to each of a sample by descriptor that lie beyond its reach; -1 stands for none."""
    depth = config.top_k if config.enabled else WITHOUT_MATCHING
    queries_SD = features.rows(sample_S)
    near: list[NDArray[np.int64]] = []
    if by_place:
        near = within_radius(taken(positions, sample_S), positions, reach)
    ids_ST = np.full((len(sample_S), depth), -1, dtype=np.int64)
    cosines_ST = np.full((len(sample_S), depth), -np.inf, dtype=np.float32)
    for first, rows_ND in features.blocks(0, 1, BLOCK_BYTES):
        cosines_SN = queries_SD @ rows_ND.T
        stop = first + len(rows_ND)
        for row, number in enumerate(sample_S.tolist()):
            if by_place:
                inside = near[row][(near[row] >= first) & (near[row] < stop)] - first
                cosines_SN[row, inside] = -np.inf
                if first <= number < stop:
                    cosines_SN[row, number - first] = -np.inf
            else:
                low, high = max(first, number - int(reach)), min(stop, number + int(reach) + 1)
                cosines_SN[row, max(low - first, 0) : max(high - first, 0)] = -np.inf
        both = np.concatenate([cosines_ST, cosines_SN], axis=1)
        numbers = np.concatenate([ids_ST, np.broadcast_to(np.arange(first, stop), cosines_SN.shape)], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :depth]
        cosines_ST, ids_ST = (np.take_along_axis(one, order, axis=1) for one in (both, numbers))
    ids_ST[~np.isfinite(cosines_ST)] = -1
    width = int((ids_ST >= 0).sum(axis=1).max(initial=0))
    return ids_ST[:, :width], cosines_ST[:, :width]
