"""Several shard sets as one: ids that count on, weights that are kept exactly, plans that can be written and read."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig
from data_pipeline.index import read_index
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from data_pipeline.plan import Batching, plan_epoch, visits_of_epoch
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.conftest import Native
from tests.photos import write_gsv_cities


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    cities = [{"A": dict.fromkeys(range(9), 5), "B": dict.fromkeys(range(12), 4)}, {"A": dict.fromkeys(range(10), 6)}]
    for number, places in enumerate(cities):
        write_gsv_cities(folder / f"native{number}", places, seed=number)
        write_shards(
            read_gsv_cities(folder / f"native{number}"), folder / f"set{number}", ShardOptions(shard_bytes=20_000)
        )
    return [folder / "set0", folder / "set1"]


def config(sets: list[Path], **changes: object) -> DataConfig:
    options: dict = {"places_per_batch": 4, "images_per_place": 3, "shards": str(sets[0])}
    return DataConfig(**(options | changes))


def test_places_and_cities_count_on_from_set_to_set(sets: list[Path]) -> None:
    mixture = read_mixture(config(sets, mix={str(sets[1]): 1}))
    first, second = (read_index(folder) for folder in sets)
    assert (mixture.num_places, mixture.num_images, mixture.cities) == (31, 153, ["A", "B", "A"])
    assert mixture.num_views.tolist() == [5] * 9 + [4] * 12 + [6] * 10
    assert mixture.place_city.tolist() == [0] * 9 + [1] * 12 + [2] * 10
    for place in range(31):
        found = mixture.place_range(place)
        expected = first.place_range(place) if place < 21 else second.place_range(place - 21)
        assert (found.location, found.start, found.length) == (expected.location, expected.start, expected.length)
        assert found.crc32.tolist() == expected.crc32.tolist()


def test_one_set_alone_is_planned_as_ever(sets: list[Path]) -> None:
    index = read_index(sets[0])
    alone = EpochPlans(read_mixture(config(sets)), config(sets), seed=3).epoch(4)
    plain = plan_epoch(
        index.place_city,
        index.num_views,
        Batching(places_per_batch=4, images_per_place=3, composition="city"),
        seed=3,
        epoch=4,
    )
    assert np.array_equal(alone.places_SP, plain.places_SP)
    assert np.array_equal(alone.views_SPK, plain.views_SPK)


@pytest.mark.parametrize("composition", ["city", "mixed"])
@pytest.mark.parametrize(("weight", "seen"), [(0.5, 5), (1, 10), (2, 20), (2.3, 23)])
def test_weights_are_kept_exactly(sets: list[Path], weight: float, seen: int, composition: str) -> None:
    data = config(sets, mix={str(sets[1]): weight}, composition=composition)
    plans = EpochPlans(read_mixture(data), data, seed=0)
    assert plans.num_steps == (21 + seen) // 4
    of_epochs = [plans.epoch(epoch) for epoch in range(4)]
    for plan in of_epochs:
        assert plan.num_steps == plans.num_steps
        counts = np.bincount(plan.places_SP.ravel(), minlength=31)
        assert (21 + seen) % 4 == 21 - counts[:21].sum() + seen - counts[21:].sum()
        assert counts[:21].max() == 1
        assert counts[21:].max() <= -(-seen // 10)
        assert all(len(set(row)) == 4 for row in plan.places_SP.tolist())
        if composition == "city":
            of_one_city = [len(set(plans.places.place_city[row])) == 1 for row in plan.places_SP]
            assert sum(of_one_city) >= 9 // 4 + 12 // 4 + seen // 4
    if weight == 0.5:
        halves = [set(plan.places_SP[plan.places_SP >= 21].tolist()) for plan in of_epochs[:2]]
        assert not halves[0] & halves[1]


@settings(max_examples=200)
@given(st.integers(1, 60), st.floats(0.05, 4), st.integers(0, 3), st.integers(0, 2))
def test_visits_rotate_until_all_places_had_their_turn(places: int, weight: float, seed: int, stream: int) -> None:
    more = round((weight - int(weight)) * places)
    epochs = -(-places // more) if more else 1
    visits = [visits_of_epoch(places, weight, seed=seed, epoch=e, stream=stream) for e in range(2 * epochs)]
    assert {int(v.sum()) for v in visits} == {int(weight) * places + more}
    for v in visits:
        assert set(v.tolist()) <= {int(weight), int(weight) + 1}
    for turn in (visits[:epochs], visits[epochs:]):
        if more:
            assert (np.sum(turn, axis=0) > epochs * int(weight)).all()


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(1, 25), st.sampled_from([0.3, 0.5, 1, 1.5, 2, 3])), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from(["city", "mixed"]),
    st.integers(0, 3),
)
def test_no_batch_holds_a_place_twice(sets: list[tuple[int, float]], batch: int, composition: str, epoch: int) -> None:
    cities = np.repeat(np.arange(len(sets)), [n for n, _ in sets])
    visits = np.concatenate([visits_of_epoch(n, w, seed=0, epoch=epoch, stream=s) for s, (n, w) in enumerate(sets)])
    batching = Batching(places_per_batch=batch, images_per_place=2, composition=composition)
    views = np.full(len(cities), 5)
    try:
        plan = plan_epoch(cities, views, batching, seed=1, epoch=epoch, visits=visits)
    except ValueError as error:
        assert "fewer than data.places_per_batch" in str(error)  # noqa: PT017
        return
    assert plan.num_steps == visits.sum() // batch
    assert all(len(set(row)) == batch for row in plan.places_SP.tolist())
    assert (np.bincount(plan.places_SP.ravel(), minlength=len(cities)) <= visits).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mix": {"same": 2.0}}, "which data.shards names already"),
        ({"mix": {"other": 0.5}, "repeat": {"B": 2}}, "data.repeat needs whole weights"),
        ({"repeat": {"C": 2}}, "data.repeat names C; the shard set has A, B"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(sets: list[Path], changes: dict, words: str) -> None:
    names = {"same": str(sets[0]), "other": str(sets[1])}
    if "mix" in changes:
        changes = changes | {"mix": {names[name]: weight for name, weight in changes["mix"].items()}}
    data = config(sets, **changes)
    with pytest.raises(ValueError, match=words):
        EpochPlans(read_mixture(data), data, seed=0)


def test_a_plan_is_written_and_read(sets: list[Path], tmp_path: Path) -> None:
    data = config(sets)
    plan = EpochPlans(read_mixture(data), data, seed=0).epoch(1)
    plan.write(tmp_path / "plan.parquet")
    table = pq.read_table(tmp_path / "plan.parquet")
    assert np.array_equal(table["place_id"].to_numpy().reshape(-1, 4), plan.places_SP)
    assert table["views"].to_pylist() == plan.views_SPK.reshape(-1, 3).tolist()
    assert table["step"].to_pylist() == [step for step in range(plan.num_steps) for _ in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.parquet"]


def test_the_digest_says_what_is_trained_on_and_not_where_it_lies(
    shard_set: Path, native: Native, tmp_path: Path
) -> None:
    write_shards(read_gsv_cities(native[0], cities=["Oslo"]), tmp_path / "oslo")
    shutil.copytree(shard_set, tmp_path / "copy")
    index, copy, oslo = read_index(shard_set), read_index(tmp_path / "copy"), read_index(tmp_path / "oslo")
    assert re.fullmatch("[0-9a-f]{16}", index.digest)
    assert PlaceMixture([index], [1.0]).digest == PlaceMixture([copy], [1.0]).digest == index.digest == copy.digest
    others = [
        PlaceMixture([oslo], [1.0]),
        PlaceMixture([index], [2.0]),
        PlaceMixture([index, oslo], [1.0, 1.0]),
        PlaceMixture([oslo, index], [1.0, 1.0]),
        PlaceMixture([index, oslo], [1.0, 0.5]),
    ]
    assert len({index.digest, *(mixture.digest for mixture in others)}) == 6
