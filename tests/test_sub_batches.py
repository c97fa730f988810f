"""Steps made of a part from each data set: planned for any number of ranks, in rounds that know no epochs."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig, Recipe
from data_pipeline.mixture import EpochPlans, read_mixture
from data_pipeline.plan import EpochPlan
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.sub_batches import SetPlaces, plan_sets
from tests.photos import write_gsv_cities
from trainer.first_checks import images_per_rank


def set_places(sizes: list[int], cities: int = 2, views: int = 5) -> list[SetPlaces]:
    first = np.cumsum([0, *sizes])
    return [
        SetPlaces(f"s{n}", int(first[n]), np.arange(size) % cities, np.full(size, views), np.ones(size, np.bool_))
        for n, size in enumerate(sizes)
    ]


def rows_of(plan: EpochPlan, one: SetPlaces) -> np.ndarray:
    """The places of a set in each step [S, P_s], counted from 0."""
    own = (plan.places_SP >= one.first_place) & (plan.places_SP < one.first_place + len(one.num_views))
    return plan.places_SP[own].reshape(plan.num_steps, -1) - one.first_place


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(6, 40), st.integers(1, 6)), min_size=1, max_size=4),
    st.sampled_from(["city", "mixed"]),
    st.integers(0, 3),
)
def test_every_step_has_its_places_of_each_set(parts: list[tuple[int, int]], composition: str, epoch: int) -> None:
    sets, wanted = set_places([size for size, _ in parts]), [p for _, p in parts]
    plan = plan_sets(sets, wanted, 3, composition, seed=1, epoch=epoch)
    assert plan.num_steps == max(size // p for size, p in parts)
    blocks = np.gcd.reduce(wanted)
    for one, p in zip(sets, wanted, strict=True):
        rows = rows_of(plan, one)
        assert rows.shape == (plan.num_steps, p)
        assert all(len(set(row)) == p for row in rows.tolist())
    assert (plan.views_SPK < 5).all()
    assert all(len(set(views)) == 3 for views in plan.views_SPK.reshape(-1, 3).tolist())
    for ranks in (n for n in range(1, blocks + 1) if blocks % n == 0):
        for rank in range(ranks):
            places, _ = plan.rank_slice(0, rank, ranks)
            for one, p in zip(sets, wanted, strict=True):
                own = (places >= one.first_place) & (places < one.first_place + len(one.num_views))
                assert own.sum() == p // ranks


def test_rounds_of_a_set_run_on_over_epochs() -> None:
    """A set of 9 in parts of 2 has rounds of 4 steps; epochs have 11. Each round sees 8 places once."""
    sets = set_places([9, 33])
    plans = [plan_sets(sets, [2, 3], 2, "mixed", seed=4, epoch=epoch) for epoch in range(4)]
    assert {plan.num_steps for plan in plans} == {11}
    small = np.concatenate([rows_of(plan, sets[0]) for plan in plans])
    rounds = [small[start : start + 4].ravel().tolist() for start in range(0, 44, 4)]
    assert all(len(set(places)) == 8 for places in rounds)
    assert len({tuple(places) for places in rounds}) == 11
    assert len({frozenset(range(9)) - frozenset(places) for places in rounds}) > 2  # another one is left out
    for plan in plans:
        assert sorted(rows_of(plan, sets[1]).ravel().tolist()) == list(range(33))
    again = plan_sets(sets, [2, 3], 2, "mixed", seed=4, epoch=3)
    assert np.array_equal(again.places_SP, plans[3].places_SP)
    assert np.array_equal(again.views_SPK, plans[3].views_SPK)


def test_sets_are_drawn_apart_and_a_part_is_of_one_city() -> None:
    sets = set_places([24, 24])
    plan = plan_sets(sets, [4, 4], 2, "city", seed=0, epoch=0)
    first, second = (rows_of(plan, one) for one in sets)
    assert not np.array_equal(first, second)
    assert all(len({place % 2 for place in row}) == 1 for row in (*first.tolist(), *second.tolist()))


def test_order_is_pinned() -> None:
    """The order of data is part of a recipe, as in tests/test_plan.py."""
    plan = plan_sets(set_places([5, 6]), [1, 2], 2, "mixed", seed=7, epoch=1)
    assert plan.places_SP.tolist() == PINNED_PLACES
    assert plan.views_SPK[0].tolist() == PINNED_VIEWS


PINNED_PLACES = [[2, 10, 5], [4, 9, 6], [1, 5, 8], [0, 7, 10], [3, 10, 6]]
PINNED_VIEWS = [[2, 0], [2, 4], [2, 3]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    for number, places in enumerate((9, 12)):
        write_gsv_cities(folder / f"native{number}", {"A": dict.fromkeys(range(places), 4)}, seed=number)
        write_shards(read_gsv_cities(folder / f"native{number}"), folder / f"set{number}")
    return {"one": str(folder / "set0"), "two": str(folder / "set1")}


def config(named: dict[str, str], **changes: object) -> DataConfig:
    return DataConfig.model_validate(
        {"composition": "sets", "sets": named, "places_per_batch": 8, "images_per_place": 3} | changes
    )


def test_a_recipe_names_its_sets(sets: dict[str, str]) -> None:
    data = config(sets, set_places={"two": 6, "one": 2})
    assert data.places_of_sets == {"one": 2, "two": 6}
    mixture = read_mixture(data)
    plans = EpochPlans(mixture, data, seed=0)
    assert mixture.num_places == 21
    assert plans.num_steps == 4
    assert plans.steps_of_rounds() == {"one": 4, "two": 2}
    counts = Counter(plans.epoch(0).places_SP.ravel().tolist())
    assert sum(counts[place] for place in range(9)) == 8
    assert {counts[place] for place in range(9, 21)} == {2}
    for place in (0, 8, 9, 20):
        assert mixture.place_range(place).location.startswith(sets["one" if place < 9 else "two"])


def test_held_out_places_are_in_no_step(sets: dict[str, str]) -> None:
    data = config(sets, held_out=0.3, places_per_batch=4)
    plans = EpochPlans(read_mixture(data), data, seed=0)
    seen = np.unique(np.concatenate([plans.epoch(epoch).places_SP.ravel() for epoch in range(6)]))
    assert len(plans.held_out) == 6
    assert sorted({*seen.tolist(), *plans.held_out.tolist()}) == list(range(21))
    assert not set(seen.tolist()) & set(plans.held_out.tolist())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sets": {}}, "composition sets needs sets"),
        ({"composition": "city"}, "sets is for composition sets, and composition is city"),
        ({"composition": "mixed", "sets": {}, "set_places": {"one": 2}}, "set_places is for composition sets"),
        ({"places_per_batch": 9}, "places_per_batch 9 is not divisible by 2 sets"),
        ({"set_places": {"one": 4}}, "must name the same sets, and two is in one alone"),
        ({"set_places": {"one": 4, "two": 3}}, "set_places add up to 7, places_per_batch is 8"),
        ({"sets": {"a b": "x", "c": "y"}}, "'a b' is not a plain name"),
        ({"shards": "elsewhere"}, "shards elsewhere is not read with composition sets"),
        ({"mix": {"x": 1}}, "mix does not go with composition sets"),
        ({"repeat": {"A": 2}}, "repeat does not go with composition sets"),
        ({"fit": True}, "fit does not go with composition sets"),
    ],
)
def test_recipes_that_make_no_batch_are_refused(sets: dict[str, str], changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(sets, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set_places": {"one": 10, "two": 2}, "places_per_batch": 12}, "data.sets one: 9 places are fewer than the"),
        ({"images_per_place": 5}, "data.sets one: place 0 has 4 views, fewer than data.images_per_place 5"),
        ({"held_out": 0.6}, "data.sets .*places are fewer than the 4"),
    ],
)
def test_sets_that_are_too_small_are_refused(sets: dict[str, str], changes: dict, words: str) -> None:
    data = config(sets, **changes)
    with pytest.raises(ValueError, match=words):
        EpochPlans(read_mixture(data), data, seed=0)


def test_parts_that_ranks_cannot_share_are_refused(sets: dict[str, str]) -> None:
    recipe = Recipe(data=config(sets, set_places={"one": 2, "two": 6}))
    assert images_per_rank(recipe, 2) == 12
    with pytest.raises(ValueError, match="one 2, two 6 places, which 4 ranks cannot share evenly"):
        images_per_rank(recipe, 4)


def test_weights_are_of_sets_that_there_are(sets: dict[str, str]) -> None:
    recipe = {"data": config(sets).model_dump(), "loss": {"set_weights": {"tow": 2}}}
    with pytest.raises(ValueError, match=r"loss\.set_weights names tow; data\.sets has one, two"):
        Recipe.model_validate(recipe)
    with pytest.raises(ValueError, match=r"data\.sets has none"):
        Recipe.model_validate({"loss": {"set_weights": {"tow": 2}}})
    for weight in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="set_weights"):
            Recipe.model_validate(recipe | {"loss": {"set_weights": {"two": weight}}})


def test_a_set_twice_meets_itself_in_no_queue(sets: dict[str, str]) -> None:
    twice = {"composition": "sets", "sets": {"a": sets["one"], "b": sets["one"]}}
    Recipe.model_validate({"data": twice})
    with pytest.raises(ValueError, match="names a shard set twice"):
        Recipe.model_validate({"data": twice, "memory": {"queue_over": "all"}})
    Recipe.model_validate({"data": twice, "memory": {"queue_over": "all", "min_negative_m": 1}})
