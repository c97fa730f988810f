"""Miners: which of an anchor's pairs enter the loss. Named and defined as in pytorch-metric-learning.

A miner is a callable that takes a `Tile` and returns `Mined`. A line of MINERS in configs/registry.py makes it known by
name; a dataclass's fields are its arguments in a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from memory.tiles import Mined, Tile, euclidean


class Miner(Protocol):
    """Chooses pairs of a tile, without gradient."""

    def __call__(self, tile: Tile) -> Mined: ...


@dataclass(frozen=True)
class AllPairs:
    """Every pair."""

    def __call__(self, tile: Tile) -> Mined:
        negative_AR = torch.gt(tile.negative_AR, -torch.inf, out=torch.empty_like(tile.negative_AR))
        return Mined(tile.is_positive_AP.to(negative_AR), negative_AR)


@dataclass(frozen=True)
class MultiSimilarityMiner:
    """Pairs about as hard as the anchor's hardest pair of the other kind (Wang et al., CVPR 2019).

    A positive is kept if it is less similar than the hardest negative plus epsilon, a negative if it is more similar
    than the hardest positive minus epsilon. An anchor without positives keeps nothing; where it meets its own stored
    copy (in_batch: detached) the copy is its hardest positive.
    """

    epsilon: float = 0.1

    def __call__(self, tile: Tile) -> Mined:
        hardest_positive_A = tile.hardest_positive_A
        if tile.meets_itself:
            hardest_positive_A = hardest_positive_A.clamp(max=1.0)
        positive_AP = tile.is_positive_AP & (tile.positive_AP - self.epsilon < tile.hardest_negative_A[:, None])
        negative_AR = torch.gt(
            tile.negative_AR, (hardest_positive_A - self.epsilon)[:, None], out=torch.empty_like(tile.negative_AR)
        )
        return Mined(positive_AP.to(negative_AR), negative_AR)


@dataclass(frozen=True)
class TripletMarginMiner:
    """Triplets by how far the negative is beyond the positive, d_an - d_ap, in Euclidean distance.

    all: at most `margin`; hard: of these, at most 0; semihard: of these, above 0; easy: above `margin`.
    """

    margin: float = 0.2
    type_of_triplets: Literal["all", "hard", "semihard", "easy"] = "all"

    def __post_init__(self) -> None:
        if self.type_of_triplets not in ("all", "hard", "semihard", "easy"):
            raise ValueError(f"type_of_triplets is {self.type_of_triplets!r}; it is all, hard, semihard or easy")

    def __call__(self, tile: Tile) -> Mined:
        positive_AP, negative_AR = euclidean(tile.positive_AP), euclidean(tile.negative_AR)

        def triplets(slot: int) -> torch.Tensor:
            gap_AR = negative_AR - positive_AP[:, slot, None]
            kept_AR = gap_AR > self.margin if self.type_of_triplets == "easy" else gap_AR <= self.margin
            if self.type_of_triplets == "hard":
                kept_AR &= gap_AR <= 0
            elif self.type_of_triplets == "semihard":
                kept_AR &= gap_AR > 0
            return kept_AR & tile.is_positive_AP[:, slot, None] & (tile.negative_AR > -torch.inf)

        count_AP, count_AR = torch.zeros_like(tile.positive_AP), torch.zeros_like(tile.negative_AR)
        for slot in range(positive_AP.shape[1]):
            kept_AR = triplets(slot)
            count_AP[:, slot] = kept_AR.sum(1)
            count_AR += kept_AR
        count_AP = tile.ranks.sum(count_AP)
        return Mined(count_AP.clamp(max=1), count_AR.clamp(max=1), count_AP, count_AR, triplets)
