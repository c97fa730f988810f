"""The plan made in blocks, its views drawn when asked for: bitwise the plain plan, for every composition."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import Batching, EpochPlan, plan_epoch
from tests.plain_plan import plain_plan


@st.composite
def plans(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Batching, dict]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    cities = np.repeat(np.arange(len(sizes)) * 3, sizes)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    if draw(st.booleans()):  # as no shard set has them
        rng.shuffle(cities)
    views = rng.integers(4, 12, len(cities))
    composition = draw(st.sampled_from(["city", "mixed"]))
    repeat = (
        {}
        if composition == "mixed"
        else draw(st.dictionaries(st.integers(0, 4).map(lambda n: 3 * n), st.integers(1, 3)))
    )
    batching = Batching(draw(st.integers(1, len(cities))), draw(st.integers(1, 4)), composition, repeat)
    visits = draw(st.sampled_from([None, 1, 2, 3]))
    options = {"seed": draw(st.integers(0, 2**32)), "epoch": draw(st.integers(0, 5))}
    return cities, views, batching, options | {"visits": visits and rng.integers(0, visits + 1, len(cities))}


@pytest.mark.parametrize("at_once", [3, 2**15])
def test_blocks_give_the_plain_plan(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.plan._AT_ONCE", at_once)

    @settings(max_examples=100, deadline=None)
    @given(plans())
    def check(world: tuple[np.ndarray, np.ndarray, Batching, dict]) -> None:
        cities, views, batching, options = world
        try:
            plan = plan_epoch(cities, views, batching, **options)
        except ValueError as error:
            assert "fewer than data.places_per_batch" in str(error)  # noqa: PT017
            return
        places_SP, views_SPK = plain_plan(cities, views, batching, **options)
        assert np.array_equal(plan.places_SP, places_SP)
        assert plan.views_SPK.dtype == plan.places_SP.dtype == np.int64
        assert np.array_equal(plan.views_SPK, views_SPK)
        for step in range(plan.num_steps):
            assert np.array_equal(plan.views_of(slice(step, step + 1))[0], views_SPK[step])

    check()


def test_stored_views_make_a_plan_too() -> None:
    places_SP, views_SPK = np.arange(6).reshape(3, 2), np.arange(12).reshape(3, 2, 2)
    plan = EpochPlan(places_SP, views_SPK.__getitem__)
    assert np.array_equal(plan.views_SPK, views_SPK)
    places, views = plan.rank_slice(1, 1, 2)
    assert (places.tolist(), views.tolist()) == ([3], [[6, 7]])


@pytest.mark.parametrize("composition", ["city", "mixed"])
def test_memory_is_bounded_by_the_places(composition: str) -> None:
    """16 bytes for each place at the most, and little that does not grow with them; numpy tells tracemalloc."""
    peaks = []
    for places in (200_000, 800_000):
        cities, views = np.arange(places) * 20 // places, np.full(places, 4)
        batching = Batching(places_per_batch=64, images_per_place=4, composition=composition)
        tracemalloc.start()
        plan = plan_epoch(cities, views, batching, seed=0, epoch=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 8.2 * places + 2e5
        assert plan.num_steps == places // 64
    assert (peaks[1] - peaks[0]) / 600_000 < 16.8
