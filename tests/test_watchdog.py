"""Who is to blame for a standstill."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trainer.watchdog import SECTIONS, Position, culprit


def positions(orders: list[tuple[int, str]]) -> dict[int, Position]:
    return {rank: Position(step, section, 7, 61.0, f"n{rank}") for rank, (step, section) in enumerate(orders)}


def moved(before: dict[int, Position], silent: set[int]) -> dict[int, Position]:
    return {rank: p if rank in silent else replace(p, beat=p.beat + 1) for rank, p in before.items()}


places = st.tuples(st.integers(0, 3), st.sampled_from(SECTIONS))


@given(st.lists(places, min_size=1, max_size=9))
def test_of_ranks_that_speak_the_one_furthest_behind_is_named(orders: list[tuple[int, str]]) -> None:
    before = positions(orders)
    rank, text = culprit(before, moved(before, set()), len(orders))
    assert all(before[rank].order <= other.order for other in before.values())
    assert f"rank {rank} on n{rank} is in section {orders[rank][1]} of step {orders[rank][0]} since 61 s" in text


@given(st.lists(places, min_size=2, max_size=9), st.data())
def test_a_silent_rank_is_named_wherever_the_others_are(orders: list[tuple[int, str]], data: st.DataObject) -> None:
    before = positions(orders)
    silent = data.draw(st.sets(st.integers(0, len(orders) - 1), min_size=1, max_size=len(orders) - 1))
    after = moved(before, silent)
    rank, text = culprit(before, after, len(orders))
    assert rank == min(silent)
    assert f"rank {rank} on n{rank} is silent" in text
    assert f"last heard of in section {orders[rank][1]} of step {orders[rank][0]}" in text
    gone = {r: p for r, p in after.items() if r != rank}
    assert culprit(before, gone, len(orders))[1].startswith(f"rank {rank} does not answer")
