"""An index that is killed at ten moments of its building, and ten of its growing."""

from __future__ import annotations

from pathlib import Path

from tests.index_crashes import check_killed_at


def test_killed_at_ten_random_moments_it_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    check_killed_at(tmp_path, 10)
