"""The groups of ranks themselves: how a check that fails, hangs or dies is reported, and that later ones still run."""

from __future__ import annotations

import psutil
import pytest

from tests import ranks

MODULE = "tests.faulty_checks"


@pytest.mark.slow
@pytest.mark.usefixtures("groups_of_ranks")
def test_a_faulty_check_is_named_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "OTHERS_TIMEOUT_S", 2)
    for check, world, said in (
        ("check_that_fails_on_one_rank", 2, ["killed: not done 2 s after another rank failed", "rank 1 is not rank 0"]),
        ("check_that_ends_its_process", 1, ["ended with status 7"]),
    ):
        errors = ranks.run_check(MODULE, check, world)
        assert len(errors) == len(said)
        assert all(words in error for words, error in zip(said, errors, strict=True)), errors
        assert ranks.run_check(MODULE, "check_that_passes", world) == []
        if world == 2:
            assert "all_reduce" in errors[0]  # the stack of the rank that waited
            assert "said before it failed" in errors[1]
    ranks.run_check(MODULE, "check_that_passes", 2)
    processes = [psutil.Process(process.pid) for process in ranks.GROUPS[2].processes]
    monkeypatch.setattr(ranks, "CHECK_TIMEOUT_S", 1)
    (error,) = ranks.run_check(MODULE, "check_that_hangs_on_one_rank", 2)
    assert "rank 1 of 2: killed: not done 1 s" in error
    assert "check_that_hangs_on_one_rank" in error
    assert psutil.wait_procs(processes, timeout=5)[1] == []
