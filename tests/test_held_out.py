"""Places that training never sees: drawn by the seed alone, absent from every plan, written as a benchmark; and recipes
fitted to small shard sets."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import load_recipe
from configs.schema import DataConfig, Recipe
from data_pipeline.held_out import TABLE, draw_views, held_out_folder, read_held_out, write_held_out
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from data_pipeline.plan import held_out_places
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.storage import RangeReader
from eval.benchmarks.load import load_benchmarks
from tests.photos import write_gsv_cities
from trainer.first_checks import check_start
from trainer.fit import fit_recipe, fitted


class Counted:
    """Shard sets of which only the counts are known."""

    def __init__(self, num_views: list[int], digest: str = "a") -> None:
        self.num_views = np.array(num_views, dtype=np.int64)
        self.num_places, self.digest, self.weights, self.cities = len(num_views), digest, [1.0], ["a", "b"]
        self.place_city = np.arange(len(num_views)) % 2

    def visits(self, *, seed: int, epoch: int) -> None:
        """Each place once."""


def counted(num_views: list[int]) -> PlaceMixture:
    return Counted(num_views)  # type: ignore[return-value]


@given(places=st.integers(3, 3000), share=st.floats(0.001, 0.33), seed=st.integers(0, 2**32 - 1))
def test_a_share_of_places_is_held_out_by_the_seed_alone(places: int, share: float, seed: int) -> None:
    held_out = held_out_places(places, share, seed=seed)
    assert len(held_out) == min(max(1, round(share * places)), 1000)
    assert held_out.tolist() == sorted(set(held_out.tolist()))
    assert 0 <= held_out[0] <= held_out[-1] < places
    assert np.array_equal(held_out, held_out_places(places, share, seed=seed))


def test_another_seed_holds_out_others_and_too_few_places_are_refused() -> None:
    drawn = Counter(place for seed in range(300) for place in held_out_places(10, 0.2, seed=seed).tolist())
    assert sum(drawn.values()) == 600
    assert min(drawn.values()) > 30  # 60 expected
    assert len(held_out_places(10, 0, seed=0)) == 0
    with pytest.raises(ValueError, match=r"data.held_out 0.5 leaves 1 of 2 places to train on"):
        held_out_places(2, 0.5, seed=0)


@given(seed=st.integers(0, 1000), composition=st.sampled_from(["city", "mixed"]), repeat=st.booleans())
def test_no_plan_ever_visits_a_held_out_place(seed: int, composition: str, repeat: bool) -> None:
    repeats = {"a": 2} if repeat and composition == "city" else {}
    data = DataConfig(
        places_per_batch=4,
        images_per_place=2,
        held_out=0.25,
        composition=composition,
        repeat=repeats,  # type: ignore[arg-type]
    )
    plans = EpochPlans(counted([3] * 24), data, seed=seed)
    seen = {place for epoch in range(12) for place in plans.epoch(epoch).places_SP.ravel().tolist()}
    assert len(plans.held_out) == 6
    assert not seen & set(plans.held_out.tolist())
    if not repeats:
        assert len(seen) == 18  # an epoch leaves out two, others each time


def test_the_digest_says_what_is_held_out() -> None:
    def digest(share: float, seed: int) -> str:
        data = DataConfig(places_per_batch=4, images_per_place=2, held_out=share)
        return EpochPlans(counted([3] * 24), data, seed=seed).digest

    assert digest(0, 0) == digest(0, 1) == "a"
    assert len({digest(0, 0), digest(0.1, 0), digest(0.2, 0), digest(0.2, 1)}) == 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(7), 4), "Bergen": {1: 5, 2: 4, 3: 6}})
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    return folder / "shards"


def test_held_out_places_become_a_benchmark_of_files(shards: Path, tmp_path: Path) -> None:
    places = read_mixture(DataConfig(shards=str(shards)))
    held_out = held_out_places(places.num_places, 0.3, seed=3)
    folder = held_out_folder(tmp_path, places, held_out, seed=3)
    write_held_out(folder, places, held_out, RangeReader(), seed=3)
    found = read_held_out(folder)
    assert found.query_places.tolist() == held_out.tolist()
    kept = Counter(found.database_places.tolist())
    for place in range(places.num_places):
        assert kept[place] == (places.num_views[place] - 1 if place in held_out else 1)
    views = dict(zip(held_out.tolist(), draw_views(places, held_out, seed=3)[0].tolist(), strict=True))
    for path, place in zip(found.queries, found.query_places.tolist(), strict=True):
        planned = places.place_range(place)
        data = Path(planned.location).read_bytes()[planned.start + planned.offsets[views[place]] :]
        assert path.read_bytes() == data[: planned.sizes[views[place]]]
    (benchmark,) = load_benchmarks([f"manifest:{folder / TABLE}"], Path())
    assert len(benchmark.queries) == 3
    assert benchmark.num_without_positive == 0
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_held_out(folder, places, held_out, RangeReader(), seed=3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert held_out_folder(tmp_path, places, held_out, seed=4) != folder
    assert not list(tmp_path.glob(".*"))


@given(
    num_views=st.lists(st.integers(2, 9), min_size=4, max_size=90),
    p=st.integers(2, 64),
    k=st.integers(2, 6),
    share=st.sampled_from([0.0, 0.1, 0.2]),
)
def test_a_fitted_recipe_can_be_planned_and_a_good_one_is_kept(
    num_views: list[int], p: int, k: int, share: float
) -> None:
    data = DataConfig(places_per_batch=p, images_per_place=k, held_out=share, composition="mixed", fit=True)
    recipe, notes = fit_recipe(Recipe(data=data), counted(num_views))
    plans = EpochPlans(counted(num_views), recipe.data, seed=0)
    batch = recipe.data.places_per_batch * recipe.data.images_per_place
    assert plans.num_steps >= (4 if len(num_views) >= 24 and recipe.data.places_per_batch < p else 1)
    assert recipe.memory.size <= plans.num_steps * batch
    lowered = (recipe.data.places_per_batch < p) + (recipe.data.images_per_place < k)
    assert len([note for note in notes if note.startswith("data.")]) == lowered
    assert fit_recipe(recipe, counted(num_views))[0] == recipe


def test_the_recipe_mine_fits_a_small_set_and_all_that_is_wrong_comes_at_once(shards: Path, tmp_path: Path) -> None:
    mine = load_recipe(Path("mine"))
    data = mine.data.model_copy(update={"shards": str(shards)})
    recipe, notes = fitted(mine.model_copy(update={"data": data, "output": tmp_path}))
    assert (recipe.data.places_per_batch, recipe.memory.size, len(notes)) == (2, 32, 2)
    wrong = recipe.model_copy(
        update={
            "data": data.model_copy(update={"fit": False, "images_per_place": 9, "repeat": {"Nowhere": 2}}),
            "model": mine.model.model_copy(update={"weights": "nowhere.pth"}),
            "eval": mine.eval.model_copy(update={"benchmarks": ["twon"]}),
        }
    )
    with pytest.raises(ValueError, match=r"data\.repeat names Nowhere") as error:
        check_start(wrong, 3, resume=False)
    said = str(error.value).splitlines()
    assert len(said) == 6
    for words in ("not divisible by 3 ranks", "8 places are fewer", "fewer than data.images_per_place 9", "twon"):
        assert any(words in line for line in said), words
    assert said[-1] == "weights file nowhere.pth does not exist"


def test_a_table_of_held_out_photographs_is_whole(shards: Path, tmp_path: Path) -> None:
    places = read_mixture(DataConfig(shards=str(shards)))
    write_held_out(tmp_path / "h", places, np.array([0, 5]), RangeReader(), seed=0)
    with (tmp_path / "h" / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["role"] for row in rows)["query"] == 2
    assert all((tmp_path / "h" / row["path"]).is_file() for row in rows)
