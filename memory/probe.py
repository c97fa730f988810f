"""A plug-in's loss and miner on a few similarities, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from configs.plugins import described
from memory.losses import Loss
from memory.miners import Miner
from memory.tiles import Mined, ReferenceRanks, Term, Tile

ANCHORS, SLOTS, REFERENCES = 3, 2, 5


def probe(loss: Loss, miner: Miner, names: tuple[str, str]) -> None:
    """Runs both on three anchors, one without a positive. Raises ValueError naming what is not as it should be.

    `names` are those of loss and miner, for messages.
    """
    tile = _tile()
    with torch.no_grad():
        mined = _told(f"loss.miner {names[1]}", lambda: miner(tile))
    if not isinstance(mined, Mined):
        raise ValueError(f"loss.miner {names[1]} returned {type(mined).__name__}; expected Mined(positive, negative)")
    for pairs, like, what in (
        (mined.positive_AP, tile.positive_AP, "positives"),
        (mined.negative_AR, tile.negative_AR, "negatives"),
    ):
        if not isinstance(pairs, torch.Tensor) or pairs.shape != like.shape or not pairs.is_floating_point():
            raise ValueError(
                f"loss.miner {names[1]}: its {what} are {form_of(pairs)}; expected floats of {tuple(like.shape)}"
            )
    for name in ("arrays", "weighs_anchors"):
        if not hasattr(loss, name):
            raise ValueError(f"loss.name {names[0]} has no `{name}` (docs/extending.md)")
    terms = _told(f"loss.name {names[0]}", lambda: loss(tile, mined))
    if not isinstance(terms, list) or not terms or not all(isinstance(term, Term) for term in terms):
        raise ValueError(f"loss.name {names[0]} returned {form_of(terms)}; expected a list of Term(total, divisor)")
    for term in terms:
        for part, value in zip(Term._fields, term, strict=True):
            if torch.as_tensor(value).ndim:
                raise ValueError(f"loss.name {names[0]}: {part} of a Term is {form_of(value)}; expected one number")
        if not (isinstance(term.total, torch.Tensor) and term.total.requires_grad):
            raise ValueError(f"loss.name {names[0]}: the total of a Term has no gradient in the tile's similarities")


def _told(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{what}: {described(error)}") from error


def _tile() -> Tile:
    generator = torch.Generator().manual_seed(0)
    positive_AP = torch.rand(ANCHORS, SLOTS, generator=generator)
    is_positive_AP = torch.tensor([[True, True], [True, False], [False, False]])
    negative_AR = torch.rand(ANCHORS, REFERENCES, generator=generator)
    negative_AR[0, 3:] = -torch.inf  # of its own place
    return Tile(
        (positive_AP * is_positive_AP).requires_grad_(),
        is_positive_AP,
        negative_AR.requires_grad_(),
        torch.zeros(REFERENCES),
        torch.ones(ANCHORS),
        ReferenceRanks(all_of_them=False),
        meets_itself=False,
    )


def form_of(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
