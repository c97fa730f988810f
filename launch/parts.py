"""`--part i/n`: the share of work that one task of an array does."""

from __future__ import annotations

import re


def part_of(text: str | None) -> tuple[int, int] | None:
    """(i, n) of `i/n`, None for nothing. Raises ValueError for anything but a number from 0 below n."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--part {text}: expected i/n, from 0/n to n-1/n; for example 0/16")
    return int(match[1]), int(match[2])
