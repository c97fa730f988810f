"""The epoch plan: each place once, K distinct views, the same for every rank count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import Batching, EpochPlan, plan_epoch


def planned(cities: np.ndarray, views: np.ndarray, options: dict) -> EpochPlan:
    of_epoch = {name: options[name] for name in ("seed", "epoch", "visits") if name in options}
    batching = Batching(**{name: value for name, value in options.items() if name not in of_epoch})
    return plan_epoch(cities, views, batching, **of_epoch)


def plan(cities: list[int], views: list[int], **changes: object) -> EpochPlan:
    options: dict = {"seed": 0, "epoch": 0, "places_per_batch": 4, "images_per_place": 2, "composition": "city"}
    return planned(np.array(cities), np.array(views), options | changes)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    cities = np.repeat(np.arange(len(sizes)), sizes)
    views = np.array(draw(st.lists(st.integers(4, 9), min_size=len(cities), max_size=len(cities))))
    batch = draw(st.integers(1, len(cities)))
    options = {
        "seed": draw(st.integers(0, 5)),
        "epoch": draw(st.integers(0, 5)),
        "places_per_batch": batch,
        "images_per_place": draw(st.integers(1, 4)),
        "composition": draw(st.sampled_from(["city", "mixed"])),
    }
    return cities, views, options


@settings(max_examples=150)
@given(worlds())
def test_each_place_once_and_views_distinct(world: tuple[np.ndarray, np.ndarray, dict]) -> None:
    cities, views, options = world
    p, k = options["places_per_batch"], options["images_per_place"]
    epoch = planned(cities, views, options)
    assert epoch.places_SP.shape == (len(cities) // p, p)
    assert epoch.views_SPK.shape == (len(cities) // p, p, k)
    drawn = epoch.places_SP.ravel()
    assert len(np.unique(drawn)) == len(drawn)
    assert (epoch.views_SPK >= 0).all()
    assert (epoch.views_SPK < views[epoch.places_SP][..., None]).all()
    ordered = np.sort(epoch.views_SPK, axis=-1)
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    if options["composition"] == "city":
        whole = sum(np.bincount(cities) // p)
        of_one_city = (cities[epoch.places_SP] == cities[epoch.places_SP][:, :1]).all(axis=1)
        assert of_one_city.sum() >= whole


@settings(max_examples=50)
@given(worlds(), st.sampled_from([1, 2, 4, 8]))
def test_ranks_share_the_global_batch(world: tuple[np.ndarray, np.ndarray, dict], ranks: int) -> None:
    cities, views, options = world
    options["places_per_batch"] = max(ranks, len(cities) // ranks * ranks)
    if options["places_per_batch"] > len(cities):
        return
    epoch = planned(cities, views, options)
    for step in range(epoch.num_steps):
        shares = [epoch.rank_slice(step, rank, ranks) for rank in range(ranks)]
        assert np.array_equal(np.concatenate([s[0] for s in shares]), epoch.places_SP[step])
        assert np.array_equal(np.concatenate([s[1] for s in shares]), epoch.views_SPK[step])


def test_same_inputs_same_plan_other_epoch_other_plan() -> None:
    cities, views = [0] * 20 + [1] * 21, [5] * 41
    first, again, later = (plan(cities, views, epoch=e) for e in (3, 3, 4))
    assert np.array_equal(first.places_SP, again.places_SP)
    assert np.array_equal(first.views_SPK, again.views_SPK)
    assert not np.array_equal(first.places_SP, later.places_SP)
    dropped = [set(range(41)) - set(p.places_SP.ravel().tolist()) for p in (first, later)]
    assert all(len(d) == 1 for d in dropped)
    assert len({frozenset(set(range(41)) - set(plan(cities, views, epoch=e).places_SP.ravel())) for e in range(9)}) > 2


def test_order_is_pinned() -> None:
    """The order of data is part of a recipe: it stays what it was over versions of numpy and of this code."""
    epoch = plan([0] * 5 + [1] * 4, [4] * 9, seed=7, epoch=2)
    assert epoch.places_SP.tolist() == PINNED_PLACES
    assert epoch.views_SPK[0].tolist() == PINNED_VIEWS


PINNED_PLACES = [[1, 3, 2, 0], [6, 8, 7, 5]]
PINNED_VIEWS = [[0, 3], [2, 1], [2, 1], [1, 3]]


def test_repeated_city_has_its_share_and_no_double_place_in_a_batch() -> None:
    cities = [0] * 17 + [1] * 183 + [2] * 10
    epoch = plan(cities, [5] * 210, places_per_batch=8, repeat={0: 11})
    counts = np.bincount(epoch.places_SP.ravel(), minlength=210)
    assert set(counts[:17].tolist()) <= {10, 11}
    assert set(counts[17:].tolist()) <= {0, 1}
    assert all(len(set(row)) == 8 for row in epoch.places_SP.tolist())


def test_views_are_drawn_evenly() -> None:
    epoch = plan([0] * 4000, [5] * 4000, images_per_place=4, composition="mixed")
    counts = np.bincount(epoch.views_SPK.ravel())
    assert np.abs(counts / counts.mean() - 1).max() < 0.02  # 3,200 a view; 3.5 standard deviations of a fair draw


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"places_per_batch": 10}, "9 places are fewer than data.places_per_batch 10"),
        ({"images_per_place": 5}, "place 3 has 4 views, fewer than data.images_per_place 5"),
        ({"repeat": {1: 2}, "places_per_batch": 6}, "fewer than data.places_per_batch 6"),
        ({"repeat": {1: 2}, "composition": "mixed"}, "needs data.composition city"),
    ],
)
def test_impossible_plans_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan([0] * 5 + [1] * 4, [5, 5, 5, 4, 5, 5, 5, 5, 5], **changes)
