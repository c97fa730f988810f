"""Mutual nearest neighbours of padded patch sets by one batched matrix product and its two maxima."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configs.schema import RerankConfig
from eval.features import Patches
from eval.local_features import NO_CELL


@dataclass(frozen=True)
class Matches:
    """For each patch n of query b and each candidate t: whether it is matched, with which patch, how well."""

    matched_BNT: torch.Tensor  # bool
    nearest_BNT: torch.Tensor  # int64, patch of the candidate
    cosine_BNT: torch.Tensor  # float32


def similarities(query_BNC: torch.Tensor, candidates_BTMC: torch.Tensor) -> torch.Tensor:
    """Cosines [B, N, T, M] of all patch pairs of each query with each of its candidates."""
    sim_BNX = torch.bmm(query_BNC, candidates_BTMC.flatten(1, 2).transpose(1, 2))
    return sim_BNX.unflatten(2, candidates_BTMC.shape[1:3])


def mutual_matches(sim_BNTM: torch.Tensor, nn_match_thresh: float) -> Matches:
    """Pairs of patches that are each other's nearest, above `nn_match_thresh` (>= 0), each candidate by itself.

    Of equally near patches the first counts, on both sides. Padding has cosine 0 and so is never matched.
    """
    best_BNT, nearest_BNT = sim_BNTM.max(dim=3)
    best_BTM = sim_BNTM.amax(dim=1)
    nearest_BTN, best_BTN = nearest_BNT.transpose(1, 2), best_BNT.transpose(1, 2)
    mutual_BTN = (best_BTN == best_BTM.gather(2, nearest_BTN)) & (best_BTN > nn_match_thresh)
    num_patches = sim_BNTM.shape[1]
    row_BTN = torch.arange(num_patches, device=sim_BNTM.device).expand_as(nearest_BTN)
    first_BTM = torch.full_like(best_BTM, num_patches, dtype=torch.int64)
    first_BTM.scatter_reduce_(2, nearest_BTN, row_BTN.where(mutual_BTN, num_patches), "amin")
    mutual_BTN &= first_BTM.gather(2, nearest_BTN) == row_BTN
    return Matches(mutual_BTN.transpose(1, 2), nearest_BNT, best_BNT)


def match_scores(queries: Patches, candidates: Patches, config: RerankConfig) -> torch.Tensor:
    """Scores [B, T] of B queries with T candidates each (candidates of query b are rows b * T to b * T + T)."""
    candidates_BTMC = candidates.codes_BMC.unflatten(0, (len(queries.codes_BMC), -1))
    matches = mutual_matches(similarities(queries.codes_BMC, candidates_BTMC), config.nn_match_thresh)
    return score_matches(matches, queries, candidates, config)


def score_matches(matches: Matches, queries: Patches, candidates: Patches, config: RerankConfig) -> torch.Tensor:
    """Scores [B, T]: `count` is the number of matches, `similarity_sum` the sum of their cosines.

    With `match_weight` saliency each counts as much as the geometric mean of the saliency of its two patches (FoL++,
    arXiv 2604.22390, weights matches by how reliable their patches are).

    With geometry `translation` only matches count that agree on one shift of the patch grid: the largest sum of those
    whose shifts fit in a window of 2 * geometry_cells + 1 patches a side, over all windows, without rotation or scale.
    Class tokens have no position and no vote.
    """
    weight_BNT = matches.matched_BNT.float()
    if config.score == "similarity_sum":
        weight_BNT = weight_BNT * matches.cosine_BNT
    if config.match_weight == "saliency":
        weight_BNT = weight_BNT * _pair_saliency(matches, queries, candidates)
    if config.geometry == "none":
        return weight_BNT.sum(dim=1)
    batch, _, depth = weight_BNT.shape
    b, n, t = weight_BNT.nonzero(as_tuple=True)  # few of all patches
    own_X2 = queries.cell_BM2[b, n]
    other_X2 = candidates.cell_BM2[b * depth + t, matches.nearest_BNT[b, n, t]]
    on_grid_X = (own_X2[:, 0] != NO_CELL) & (other_X2[:, 0] != NO_CELL)
    shift_X2 = (other_X2 - own_X2)[on_grid_X]
    pair_X, weight_X = (b * depth + t)[on_grid_X], weight_BNT[b, n, t][on_grid_X]
    scores_P = torch.zeros(batch * depth, device=weight_BNT.device)
    if not len(shift_X2):
        return scores_P.unflatten(0, (batch, depth))
    shift_X2 = shift_X2 - shift_X2.amin(dim=0)
    height, width = (shift_X2.amax(dim=0) + 1).tolist()
    window = 2 * config.geometry_cells + 1
    # As many maps of votes at a time as take the memory that the cosines took.
    cosines = weight_BNT.numel() * candidates.codes_BMC.shape[1]
    step = max(1, cosines // (2 * (height + window) * (width + window)))
    for first in range(0, len(scores_P), step):
        pairs = min(step, len(scores_P) - first)
        here_X = (pair_X >= first) & (pair_X < first + pairs)
        votes_PHW = torch.zeros(pairs, height, width, device=weight_BNT.device)
        votes_PHW.index_put_((pair_X[here_X] - first, *shift_X2[here_X].T), weight_X[here_X], accumulate=True)
        sums_PHW = F.avg_pool2d(votes_PHW, window, stride=1, padding=config.geometry_cells, divisor_override=1)
        scores_P[first : first + pairs] = sums_PHW.amax(dim=(1, 2))
    return scores_P.unflatten(0, (batch, depth))


def _pair_saliency(matches: Matches, queries: Patches, candidates: Patches) -> torch.Tensor:
    """Geometric mean [B, N, T] of the saliency of each patch and of the candidate's that is nearest to it."""
    saliency_BTM = candidates.saliency_BM.unflatten(0, (len(queries.saliency_BM), -1))
    nearest_BTN = matches.nearest_BNT.transpose(1, 2)
    other_BNT = saliency_BTM.gather(2, nearest_BTN).transpose(1, 2)
    return (queries.saliency_BM[:, :, None] * other_BNT).clamp(min=0).sqrt()


def agreeing(shift_X2: torch.Tensor, weight_X: torch.Tensor, geometry_cells: int) -> torch.Tensor:
    """Which matches [X] of one pair of images, given by their shifts, score in `score_matches`: those of its window."""
    if not len(shift_X2):
        return torch.zeros(0, dtype=torch.bool, device=shift_X2.device)
    low_C2 = torch.cartesian_prod(*(axis.unique() for axis in shift_X2.T)).reshape(-1, 2)
    above_CX2 = shift_X2 - low_C2[:, None]
    inside_CX = ((above_CX2 >= 0) & (above_CX2 <= 2 * geometry_cells)).all(dim=2)
    return inside_CX[(inside_CX.float() @ weight_X).argmax()]


def pair_bytes(query_patches: int, candidate_patches: int, channels: int) -> int:
    """Most bytes that scoring one query with one candidate takes, the query's own features aside."""
    stored = candidate_patches * channels * (4 + 4)  # as read and as float32
    return stored + 4 * query_patches * candidate_patches + 48 * (query_patches + candidate_patches)
