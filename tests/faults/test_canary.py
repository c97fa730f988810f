"""The kinds of failure of a server that tests/test_canary.py leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_canary import port, run_verbs_on_shards, run_verbs_with_tracking

__all__ = ["port"]


@pytest.mark.parametrize("how", ["404", "403", "500", "cut", "closed"])
def test_shards_behind_a_failing_server(how: str, port: int, tmp_path: Path) -> None:
    run_verbs_on_shards(how, port, tmp_path)


@pytest.mark.parametrize("how", ["refused", "garbled", "cut", "closed", "403"])
def test_a_training_whose_tracking_fails(how: str, port: int, workplace: Path, tmp_path: Path) -> None:
    run_verbs_with_tracking(how, port, workplace, tmp_path)
