"""The plan of tars that are read whole: each place once, no more held than the buffer, a pure function."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import Batching, EpochPlan
from data_pipeline.stream_plan import TarOrder, plan_stream, read_again


def planned(tars: TarOrder, views: np.ndarray, **changes: object) -> EpochPlan:
    options: dict = {"places": 8, "k": 2, "lanes": 4, "buffer_places": 16, "seed": 0, "epoch": 0} | changes
    batching = Batching(options.pop("places"), options.pop("k"), "mixed")
    return plan_stream(tars, views, batching, **options)


def tars_of(sizes: list[int], *, shuffled: bool = False) -> TarOrder:
    order = np.random.default_rng(0).permutation(sum(sizes)) if shuffled else None
    return TarOrder(np.cumsum([0, *sizes]), order)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[TarOrder, dict]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    lanes = draw(st.sampled_from([1, 2, 4]))
    options = {
        "places": lanes * draw(st.integers(1, max(1, sum(sizes) // lanes))),
        "lanes": lanes,
        "buffer_places": draw(st.integers(1, 60)),
        "epoch": draw(st.integers(0, 3)),
    }
    return tars_of(sizes, shuffled=draw(st.booleans())), options


@settings(max_examples=150)
@given(worlds(), st.booleans())
def test_each_place_once_in_the_order_of_tars_and_a_bounded_buffer(
    world: tuple[TarOrder, dict], held_out: bool
) -> None:
    tars, options = world
    total = int(tars.starts[-1])
    visits = np.ones(total, dtype=np.int64)
    visits[:: 7 if held_out else total + 1] = 0
    if visits.sum() < options["places"]:
        return
    plan = planned(tars, np.full(total, 5), visits=visits, **options)
    lanes, share = options["lanes"], options["places"] // options["lanes"]
    assert plan.num_steps == visits.sum() // options["places"]
    drawn = plan.places_SP.ravel()
    assert len(np.unique(drawn)) == len(drawn)
    assert visits[drawn].all()
    reading = plan.reading_LM
    assert reading is not None
    assert np.array_equal(np.sort(reading.ravel()), np.sort(drawn))
    # Tars follow each other, and places in a tar are in its order: no byte is passed over backwards.
    row = np.arange(total) if tars.order is None else np.argsort(tars.order)
    tar = np.searchsorted(tars.starts, row[reading.ravel()], side="right")
    changes = np.flatnonzero(np.diff(tar)) + 1
    assert len(np.unique(tar)) == len(changes) + 1
    assert all((np.diff(part) > 0).all() for part in np.split(row[reading.ravel()], changes))
    window = max(1, options["buffer_places"] // lanes)
    for lane, reading_M in enumerate(reading):
        given_ = plan.places_SP[:, lane * share : (lane + 1) * share].ravel()
        position = {int(place): number for number, place in enumerate(reading_M)}
        read = np.maximum.accumulate([position[int(place)] + 1 for place in given_])
        assert (read - np.arange(len(given_)) <= window).all()


def test_same_inputs_same_plan_other_epoch_other_tars_first() -> None:
    tars = tars_of([20] * 12)
    one, same, later = (planned(tars, np.full(240, 5), epoch=epoch) for epoch in (1, 1, 2))
    assert np.array_equal(one.places_SP, same.places_SP)
    assert np.array_equal(one.views_SPK, same.views_SPK)
    assert one.reading_LM is not None
    assert later.reading_LM is not None
    assert not np.array_equal(one.reading_LM // 20, later.reading_LM // 20)


def test_order_is_pinned() -> None:
    """The order of data is part of a recipe: it stays what it was over versions of numpy and of this code."""
    plan = planned(tars_of([3, 4, 5]), np.full(12, 4), places=4, lanes=2, buffer_places=6, seed=7, epoch=2)
    assert plan.places_SP.tolist() == PINNED_PLACES
    assert plan.views_SPK[0].tolist() == PINNED_VIEWS


PINNED_PLACES = [[3, 4, 9, 10], [5, 6, 11, 1], [7, 8, 0, 2]]
PINNED_VIEWS = [[0, 3], [0, 1], [0, 3], [0, 1]]


def test_a_larger_buffer_mixes_more() -> None:
    tars, spread = tars_of([50] * 20), []
    for buffer_places in (4, 100, 400):
        plan = planned(tars, np.full(1000, 5), buffer_places=buffer_places)
        spread.append(np.mean([len(set((row // 50).tolist())) for row in plan.places_SP]))
    assert spread[0] < spread[1] < spread[2]


def test_what_a_resume_reads_again_is_less_than_the_buffer() -> None:
    tars = tars_of([25] * 16)
    plan = planned(tars, np.full(400, 5), buffer_places=40)
    assert read_again(plan, tars, 0).places == 0
    costs = [read_again(plan, tars, step) for step in range(1, plan.num_steps)]
    assert 0 < max(cost.places for cost in costs) <= 40
    assert max(cost.tars for cost in costs) <= 8  # two for each lane
    kept = planned(tars, np.full(400, 5), buffer_places=4)
    assert read_again(kept, tars, 20).places == 0  # nothing is mixed, so nothing is read twice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lanes": 3}, "data.stream_lanes 3 does not divide data.places_per_batch 8"),
        ({"places": 400}, "240 places are fewer than data.places_per_batch 400"),
        ({"k": 6}, "place 0 has 5 views, fewer than data.images_per_place 6"),
    ],
)
def test_impossible_plans_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        planned(tars_of([20] * 12), np.full(240, 5), **changes)
