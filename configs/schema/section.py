"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PATCH = 14

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def image_side(side: int) -> int:
    """`side` if the ViTs' patches cover it. Raises ValueError naming the nearest sides that they do."""
    if side < PATCH or side % PATCH:
        low = max(PATCH, side // PATCH * PATCH)
        raise ValueError(f"{side} is not a multiple of the patch size {PATCH}; nearest: {low} or {low + PATCH}")
    return side
