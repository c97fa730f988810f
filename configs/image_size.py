"""The size that images are given to a network at: the side of a square, or height and width."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

MOST_SIDE = 1 << 14
EXPECTED = "a side in pixels, nor height and width such as [322, 434]"


def _one_form(size: Any) -> Any:
    """A square's side as one number, height and width as a pair, so that one size has one form."""
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    try:
        height, width = (int(side) for side in sides)
        fits = [height, width] == [float(side) for side in sides] and min(height, width) >= 1
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or isinstance(size, bool):
        raise ValueError(f"{size!r} is neither {EXPECTED}")
    if max(height, width) > MOST_SIDE:
        raise ValueError(f"{size!r}: a side has at most {MOST_SIDE} pixels")
    return height if height == width else (height, width)


ImageSize = Annotated[int | tuple[int, int], BeforeValidator(_one_form)]


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels."""
    return size if isinstance(size, tuple) else (size, size)


def num_pixels(size: int | tuple[int, int]) -> int:
    """Height times width."""
    height, width = height_width(size)
    return height * width


def shown_size(size: int | tuple[int, int]) -> str:
    """`224`, or `322x434`: height and width."""
    return f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size)
