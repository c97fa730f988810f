"""An index that is killed while it is built or grows: the same command finishes it, with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.index_crashes import check_killed_at

pytestmark = pytest.mark.slow


def test_killed_at_three_moments_it_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    check_killed_at(tmp_path, 3)
