"""When a training is saved by time: the interval, the clock, and that rank 0's is heard by all."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import TrainerConfig
from tests.ranks import on_ranks
from trainer import save_interval
from trainer.resume import threads_note
from trainer.save_interval import SaveClock, best_interval
from trainer.start_time import StartTime, seconds_alive


@given(st.floats(0.01, 5.0), st.floats(60.0, 1e6))
def test_the_interval_loses_least(save_s: float, mtbf_s: float) -> None:
    """Against the minimum, found by search, of Daly's expected time per second of work (his equation 20)."""

    def cost(interval: float) -> float:
        return math.expm1((interval + save_s) / mtbf_s) / interval

    first_order = math.sqrt(2 * save_s * mtbf_s)
    best = min((first_order * math.exp(i / 400) for i in range(-800, 800)), key=cost)
    assert cost(best_interval(save_s, mtbf_s)) <= cost(best) * (1 + 1e-4)


def test_a_save_that_takes_longer_than_failures_are_apart_is_made_once_per_failure() -> None:
    assert best_interval(200.0, 60.0) == 60.0


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(save_interval.time, "monotonic", lambda: now)
    never, fixed, auto = SaveClock(0, 0), SaveClock(5, 0), SaveClock("auto", 60)
    now = 105.0
    assert (never.is_due(), fixed.is_due()) == (False, True)
    fixed.saving()
    assert not fixed.is_due()
    assert auto.interval_s == pytest.approx(best_interval(save_interval.FIRST_GUESS_S, 60))
    auto.saving()
    now = 108.0
    auto.saved(held_s=0.3)
    assert auto.interval_s == pytest.approx(best_interval(0.3, 60))
    auto.saving()
    now = 128.0
    auto.saved(held_s=0.3)
    assert auto.interval_s == 20.0  # it is not asked for more often than disks take it
    assert auto.is_due()


@pytest.mark.parametrize("content", [{"checkpoint_every_s": "auto"}, {"mean_time_between_failures_s": 60}])
def test_auto_and_its_rate_are_given_together(content: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="checkpoint_every_s auto and mean_time_between_failures_s"):
        TrainerConfig.model_validate(content)


def test_another_number_of_threads_is_said() -> None:
    assert threads_note(2, 2) == threads_note(0, 2) == ""
    assert "computed with 1 thread(s) per rank, this start has 2" in threads_note(1, 2)
    assert "OMP_NUM_THREADS=1 keeps them" in threads_note(1, 2)


def test_the_parts_of_a_start_add_up() -> None:
    start = StartTime()
    start.part_done("group")
    start.part_done("group")
    metrics = start.metrics()
    assert list(metrics) == ["train/restart_s", "train/restart_import_s", "train/restart_group_s"]
    parts = sum(value for name, value in metrics.items() if name != "train/restart_s")
    assert metrics["train/restart_s"] == pytest.approx(parts)
    assert metrics["train/restart_import_s"] <= seconds_alive() + 0.02  # of a clock tick


def check_rank_0_says_when_it_is_time() -> None:
    """A clock that runs ahead on another rank saves nothing; rank 0's saves on all, at the same step."""
    import torch
    import torch.distributed as dist

    from trainer.process_group import Rank
    from trainer.saving import Saving
    from trainer.votes import settle_votes, votes_of_rank

    rank = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))

    def due(on: int) -> bool:
        clock = SimpleNamespace(is_due=lambda: rank.rank == on)
        saving = SimpleNamespace(rank=rank, clock=clock, settle=lambda *_: None)
        saving.writer = SimpleNamespace(vote=lambda: (0.0, 0.0))
        saving.is_due_by_time = lambda: Saving.is_due_by_time(saving)  # type: ignore[arg-type]
        batches, stop_signal = SimpleNamespace(num_bad_images=0), SimpleNamespace(name="")
        sums = torch.tensor(votes_of_rank(batches, stop_signal, saving))  # type: ignore[arg-type]
        dist.all_reduce(sums)
        votes = settle_votes(sums.tolist(), saving)  # type: ignore[arg-type]
        assert not votes.asked_to_stop
        return votes.save_is_due

    assert due(on=0)
    assert not due(on=1)


test_on_ranks = on_ranks(__file__)
