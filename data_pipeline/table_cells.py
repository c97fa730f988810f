"""Cells of tables that are to be numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.reading import shown


def column_of_numbers(
    values: Sequence[Any], column: str, where: str | Path, *, lines: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """A table's column as float64 [N], NaN where a cell is empty; numbers or their text.

    Raises ValueError naming `where`, row and column of the first cell that is no finite number; a decimal comma and
    degrees, minutes and seconds are named as such.
    """
    numbers = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        text = "" if value is None else str(value).strip()
        if not text or (isinstance(value, float) and np.isnan(value)):
            continue
        try:
            number = float(text)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            line = row + 2 if lines is None else lines[row]
            raise ValueError(f"{where} row {line}: {column} is {shown(text)!r}; {hint(text)}")
        numbers[row] = number
    return numbers


def hint(text: str) -> str:
    """What a text that is no number seems to be, and what would be right."""
    plain = text.replace(",", ".", 1)
    if plain != text and _is_number(plain):
        return f"a decimal comma; write {plain}"
    if any(sign in text for sign in "°'\"\u2032\u2033") or text[-1:] in "NSEW":
        return "write decimal degrees, south and west negative"
    return "expected a finite number"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
