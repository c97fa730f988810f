"""Mutual nearest neighbours of padded patch sets by one batched matrix product and its two maxima."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eval.local_features import NO_CELL
from eval.store import Patches


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


def match_scores(
    query: Patches, candidates: Patches, *, nn_match_thresh: float, score: str, geometry: str, geometry_cells: int
) -> torch.Tensor:
    """Scores [B, T] of B queries with T candidates each (candidates of query b are rows b * T to b * T + T).

    `count` is the number of matches and `similarity_sum` the sum of their cosines; with geometry `translation` only of
    those that agree on one shift of the patch grid.
    """
    batch = len(query.codes_BMC)
    candidates_BTMC = candidates.codes_BMC.unflatten(0, (batch, -1))
    matches = mutual_matches(similarities(query.codes_BMC, candidates_BTMC), nn_match_thresh)
    weight_BNT = matches.matched_BNT.float()
    if score == "similarity_sum":
        weight_BNT = weight_BNT * matches.cosine_BNT
    if geometry == "none":
        return weight_BNT.sum(dim=1)
    cells_BTM2 = candidates.cell_BM2.unflatten(0, (batch, -1))
    return translation_vote(query.cell_BM2, cells_BTM2, matches.nearest_BNT, weight_BNT, geometry_cells)


def translation_vote(
    query_cell_BN2: torch.Tensor,
    cells_BTM2: torch.Tensor,
    nearest_BNT: torch.Tensor,
    weight_BNT: torch.Tensor,
    tolerance: int,
) -> torch.Tensor:
    """The largest weight [B, T] of matches whose shifts fit in a window of 2 * tolerance + 1 patches a side.

    A vote over all shifts, without rotation or scale; class tokens have no position and no vote.
    """
    is_patch_BNT = (query_cell_BN2[..., 0] != NO_CELL)[:, :, None] & (weight_BNT > 0)
    index_BTN = nearest_BNT.transpose(1, 2)
    cell_BTN2 = cells_BTM2.gather(2, index_BTN[..., None].expand(-1, -1, -1, 2))
    is_patch_BTN = is_patch_BNT.transpose(1, 2) & (cell_BTN2[..., 0] != NO_CELL)
    on_grid_BN2 = query_cell_BN2.where(query_cell_BN2 != NO_CELL, 0)
    reach = 1 + int(max(on_grid_BN2.max(), cells_BTM2.where(cells_BTM2 != NO_CELL, 0).max()))
    shift_BTN2 = (cell_BTN2 - query_cell_BN2[:, None]).clamp(-reach, reach) + reach
    side = 2 * reach + 1
    votes_BTX = torch.zeros(*index_BTN.shape[:2], side * side, device=weight_BNT.device)
    bin_BTN = shift_BTN2[..., 0] * side + shift_BTN2[..., 1]
    votes_BTX.scatter_add_(2, bin_BTN, weight_BNT.transpose(1, 2).where(is_patch_BTN, 0))
    window = 2 * tolerance + 1
    map_BTHW = votes_BTX.unflatten(2, (side, side))
    sums_BTHW = F.avg_pool2d(map_BTHW, window, stride=1, padding=tolerance, divisor_override=1)
    return sums_BTHW.amax(dim=(2, 3))


def pair_bytes(query_patches: int, candidate_patches: int, channels: int) -> int:
    """Most bytes that scoring one query with one candidate takes, the query's own features aside."""
    stored = candidate_patches * channels * (4 + 4)  # as read and as float32
    return stored + 4 * query_patches * candidate_patches + 48 * (query_patches + candidate_patches)
