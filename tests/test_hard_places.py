"""Hard places: epochs that replay, the same descriptors at any world size."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from configs.schema import DataConfig, Recipe
from data_pipeline import hard_plan
from data_pipeline.images import normalise
from data_pipeline.index import read_index
from data_pipeline.mixture import EpochPlans, read_mixture
from data_pipeline.place_positions import place_points
from data_pipeline.plan import Batching, EpochPlan, plan_epoch
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from launch.plan_command import main as plan
from tests import training
from tests.photos import write_gsv_cities
from tests.ranks import on_ranks, shared_folder
from trainer import hard_cost, hard_places
from trainer.batches import Batches
from trainer.context import Context
from trainer.hard_places import HardPlaces
from trainer.manifest import CheckpointError
from trainer.process_group import Rank
from trainer.state import build_state
from trainer.watchdog import Watchdog


@st.composite
def epochs(draw: st.DrawFn) -> tuple[DataConfig, np.ndarray, np.ndarray, np.ndarray]:
    sizes = draw(st.lists(st.integers(3, 30), min_size=1, max_size=4))
    cities = np.repeat(np.arange(len(sizes)), sizes)
    batch = draw(st.integers(2, max(2, len(cities) // 4)))
    data = DataConfig(
        places_per_batch=batch,
        images_per_place=2,
        composition=draw(st.sampled_from(["city", "mixed"])),
        hard_share=draw(st.sampled_from([0.1, 0.3, 0.5, 1.0])),
        hard_every_steps=draw(st.sampled_from([0, 1, 2, 5])),
        hard_pool=draw(st.sampled_from([1.0, 1.5, 9.0])),
    )
    visits = (np.arange(len(cities)) % 7 != 3).astype(np.int64)
    return data, cities, np.full(len(cities), 5), visits


@settings(max_examples=150)
@given(epochs(), st.integers(0, 3), st.integers(0, 3))
def test_each_place_still_comes_once_an_epoch(
    world: tuple[DataConfig, np.ndarray, np.ndarray, np.ndarray], epoch: int, lost: int
) -> None:
    data, cities, views, visits = world
    num_steps = int(visits.sum()) // data.places_per_batch
    if num_steps < 1:
        return
    batching = Batching(data.places_per_batch, data.images_per_place, data.composition)

    def rest(number: int, left: np.ndarray) -> EpochPlan:
        return plan_epoch(cities, views, batching, seed=1, epoch=number, visits=left)

    composed = hard_plan.nothing_composed(epoch, data.places_per_batch)
    hard = 0
    while composed.num_steps < num_steps:
        _, stop = hard_plan.window_of(composed.num_steps, data.hard_every_steps, num_steps)
        asked = hard_plan.num_hard(data.hard_share, composed.num_steps, stop)
        places, encoded = hard_plan.candidates(data, views, visits, composed, stop, seed=1)
        assert len(np.unique(places)) == len(places) >= asked * data.places_per_batch
        assert visits[places].all()
        assert not np.isin(places, composed.places_SP).any()
        assert ((encoded >= 0) & (encoded < 5)).all()
        made = max(0, asked - lost)  # as where too few places are far enough apart
        batches = places[: made * data.places_per_batch].reshape(made, data.places_per_batch)
        before = composed
        composed = hard_plan.extended(visits, composed, stop, batches, rest, seed=1)
        assert composed.num_steps == stop
        assert np.array_equal(composed.places_SP[: before.num_steps], before.places_SP)
        new = composed.places_SP[before.num_steps :][composed.is_hard_S[before.num_steps :]]
        assert sorted(map(tuple, new.tolist())) == sorted(map(tuple, batches.tolist()))
        plan = hard_plan.with_views(data, views, composed, seed=1)
        earlier = hard_plan.with_views(data, views, before, seed=1) if before.num_steps else plan
        assert np.array_equal(plan.views_SPK[: before.num_steps], earlier.views_SPK[: before.num_steps])
        hard += made
    drawn = composed.places_SP.ravel()
    assert len(np.unique(drawn)) == len(drawn) == num_steps * data.places_per_batch
    assert visits[drawn].all()
    assert composed.is_hard_S.sum() == hard
    if not lost:
        assert hard == round(data.hard_share * num_steps)
    assert (np.sort(plan.views_SPK, axis=-1)[..., 1:] != np.sort(plan.views_SPK, axis=-1)[..., :-1]).all()


def test_other_epochs_have_other_candidates() -> None:
    data = DataConfig(places_per_batch=4, hard_share=0.5, hard_pool=1)
    views, visits = np.full(100, 6), np.ones(100, dtype=np.int64)
    starts = [hard_plan.nothing_composed(epoch, 4) for epoch in (0, 0, 1)]
    chosen = [hard_plan.candidates(data, views, visits, start, 25, seed=0) for start in starts]
    assert np.array_equal(chosen[0][0], chosen[1][0])
    assert np.array_equal(chosen[0][1], chosen[1][1])
    assert not np.array_equal(chosen[0][0], chosen[2][0])
    assert len(chosen[0][0]) == 12 * 4


# Recipes that are refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "at least 4 are needed: use at most 2, or set data.hard_share to 0"),  # one city of ten places
        ({"places_per_batch": 11}, "10 places are fewer than data.places_per_batch 11"),
        ({"places_per_batch": 2, "hard_share": 0.01}, "0.01 of 5 steps is none; use at least 0.2"),
        ({"places_per_batch": 2, "hard_cliques": 2}, "data.hard_cliques 2 need 2 places each"),
        ({"places_per_batch": 2, "repeat": {"Oslo": 2}}, "each place at most once per epoch"),
    ],
)
def test_what_cannot_be_hard_is_refused_in_one_line(changes: dict, words: str, ten_places: Path) -> None:
    data = DataConfig(**({"shards": str(ten_places), "places_per_batch": 4, "hard_share": 0.5} | changes))
    with pytest.raises(ValueError, match=words) as error:
        EpochPlans(read_mixture(data), data, seed=0)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("share", "words"), [(-0.1, "greater than or equal to 0"), (1.5, "less than or equal to 1")])
def test_a_share_outside_0_to_1_is_refused(share: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig(hard_share=share)


def test_a_share_is_refused_where_places_come_in_the_order_of_tars() -> None:
    with pytest.raises(ValueError, match=r"data.hard_share 0.5 chooses places from all tars; it needs data.access r"):
        DataConfig(hard_share=0.5, access="stream", composition="mixed", places_per_batch=8, stream_lanes=1)


def test_metres_without_coordinates_are_refused(ten_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(shards=str(ten_places), places_per_batch=2, hard_share=0.5, hard_min_m=25)
    places = read_mixture(data)
    EpochPlans(places, data, seed=0)
    points = place_points(places.sets)
    assert points.shape == (10, 3)
    index = read_index(ten_places)
    table = index.columns(["lat", "lon"])
    assert table.column_names == ["lat", "lon"]
    lost = table.set_column(0, "lat", [[None] * 8 + table["lat"].to_pylist()[8:]])
    monkeypatch.setattr(type(index), "columns", lambda *_: lost)
    with pytest.raises(ValueError, match=r"data.hard_min_m needs coordinates, and 2 of 10 places have none \(first: p"):
        EpochPlans(places, data, seed=0)
    EpochPlans(places, data.model_copy(update={"hard_min_m": 0.0}), seed=0)


@pytest.fixture(scope="module")
def ten_places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    write_gsv_cities(folder / "native", {"Oslo": dict.fromkeys(range(10), 4)})
    write_shards(read_gsv_cities(folder / "native"), folder / "set")
    return folder / "set"


# What `plan` says of them


@pytest.mark.parametrize("every", [0, 2])
def test_the_plan_counts_the_places_that_are_encoded(every: int) -> None:
    data = DataConfig(places_per_batch=4, hard_share=0.5, hard_every_steps=every, hard_pool=1.5)
    recipe = Recipe(data=data)
    views, visits, composed = np.full(43, 5), np.ones(43, dtype=np.int64), hard_plan.nothing_composed(0, 4)
    _, stop = hard_plan.window_of(0, every, 10)
    encoded, _ = hard_plan.candidates(data, views, visits, composed, stop, seed=0)
    assert hard_cost.num_candidates(recipe, 10) == len(encoded) == (6 if every else 30)
    assert hard_cost.num_candidates(recipe, None) == (6 if every else 0)
    assert hard_cost.num_candidates(Recipe(), 10) == 0
    all_of_them = recipe.model_copy(update={"data": data.model_copy(update={"hard_pool": 99})})
    assert 43 <= hard_cost.num_candidates(all_of_them, 10) <= 44


def test_the_plan_says_what_hard_places_take(ten_places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.shards", str(ten_places), "--data.places-per-batch", "2", "--data.repeat", "--tflops", "1"]
    flags += ["--model.backbone", "tiny14", "--model.weights", "random", "--eval.benchmarks"]
    with pytest.raises(ValueError, match="at least 4 are needed: use at most 2"):  # one city of ten places
        plan(["mini_vits", *flags, "--data.hard-share", "0.4", "--data.places-per-batch", "4"])
    assert plan(["mini_vits", *flags, "--data.hard-share", "0.4"]) == 0
    said = capsys.readouterr().out
    assert "hard places: at most 6 encoded every 5 steps, one view of each, forward only: 0.00 s" in said
    assert "hard places, composing" in said


# Over ranks


def hard_recipe(folder: Path, **data: object) -> Recipe:
    """A recipe over 22 places of noise in `folder`, which rank 0 writes."""
    if dist.get_rank() == 0:
        write_gsv_cities(folder / "native", {"Oslo": dict.fromkeys(range(22), 4)})
        write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    dist.barrier()
    options = {"shards": str(folder / "shards"), "places_per_batch": 4, "images_per_place": 2, "image_size": 28}
    return Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "data": options | {"hard_share": 0.5, "decode_threads": 0, "augmentation": "none"} | data,
            "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 1},
            "eval": {"batch_size": 5},
        }
    )


def parts(recipe: Recipe) -> tuple[HardPlaces, list[str]]:
    """Hard places in this process group, and what they say."""
    rank, said = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), []
    batches = Batches(recipe, rank)
    state = build_state(recipe, rank, images_per_rank=8 // rank.world_size)
    watchdog = Watchdog(limit_s=0, first_limit_s=0, folder=recipe.output)
    tracker: object = SimpleNamespace()  # nothing of it is asked for
    context = Context(recipe, rank, Console(quiet=True), said.append, tracker, watchdog)  # type: ignore[arg-type]
    return HardPlaces(context, state, batches), said


def check_descriptors_are_those_of_one_process_to_the_bit() -> None:
    folder = shared_folder()
    for projected in (False, True):
        hard, _ = parts(hard_recipe(folder / str(projected)))
        hard_places.NUMBERS = 64 if projected else 512
        places, views = np.arange(1, 22), np.arange(1, 22) % 4
        found = hard.encoded(places, views)
        if dist.get_rank() == 0:
            chunks = hard_places._Chunks.of(places, views, 2)
            projection = hard._projection()
            with torch.no_grad():
                rows = [
                    hard.state.model.eval()(normalise(batch.images_B3HW))
                    for batch in hard.batches.of_plan(chunks, range(11))
                ]
            alone = torch.cat(rows) if projection is None else torch.cat([row @ projection for row in rows])
            expected = torch.nn.functional.normalize(alone).half().numpy()[:21]
            assert found.dtype == np.float16
            assert np.array_equal(found, expected)
            assert found.shape == (21, 64 if projected else 128)
        else:
            assert len(found) == 0
    hard_places.NUMBERS = 512
    dist.barrier()


def check_an_epoch_is_composed_once_and_replayed() -> None:
    hard, said = parts(hard_recipe(shared_folder(), hard_every_steps=2, hard_min_m=1.0))
    plan, stop = hard(0, 0)
    assert (stop, plan.num_steps) == (2, 2)
    figures = hard.figures()
    assert figures["train/hard_steps"] == 1
    assert figures["train/hard_similarity"] > figures["train/hard_pool_similarity"]
    assert hard.figures() == {}
    again, _ = hard(0, 1)  # as a resumed run asks
    assert np.array_equal(again.places_SP, plan.places_SP)
    assert np.array_equal(again.views_SPK, plan.views_SPK)
    both, stop = hard(0, 2)
    assert stop == 4
    assert np.array_equal(both.places_SP[:2], plan.places_SP)
    assert np.array_equal(both.views_SPK[:2], plan.views_SPK)
    last, stop = hard(0, 4)
    assert stop == last.num_steps == 5
    assert len(np.unique(last.places_SP)) == 20
    everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, last.places_SP.tolist())
    assert all(one == everywhere[0] for one in everywhere)
    # What is stored counts, whatever the descriptors would say now.
    composed = hard.state.composed
    assert composed is not None
    hard.state.composed = hard_plan.Composed(0, composed.places_SP[::-1].copy(), composed.is_hard_S[::-1].copy())
    replayed, _ = hard(0, 3)
    assert np.array_equal(replayed.places_SP, last.places_SP[::-1])
    hard.state.composed = None
    with pytest.raises(CheckpointError, match="step 3 of epoch 0 are not in the checkpoint"):
        hard(0, 3)
    assert ["1 of 1 hard steps made of 6 places" in line for line in said] == [True]


def check_places_that_are_too_near_are_counted_and_said() -> None:
    hard, said = parts(hard_recipe(shared_folder(), hard_min_m=1e8))  # wider than the Earth
    plan, stop = hard(0, 0)
    assert stop == plan.num_steps == 5
    assert len(np.unique(plan.places_SP)) == 20
    assert hard.figures()["train/hard_steps_missed"] == 2
    assert ["0 of 2 hard steps could be made of 12 places at least 1e+08 m apart" in line for line in said] == [True]


def check_a_descriptor_that_is_not_finite_ends_all_ranks_with_its_place() -> None:
    hard, _ = parts(hard_recipe(shared_folder()))
    with torch.no_grad():
        next(p for p in hard.state.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="its descriptor is not finite; the training has diverged"):
        hard(0, 0)


test_on_ranks = on_ranks(__file__)


# Stopped in the middle of an epoch

FLAGS = ("--data.hard-share", "0.5", "--tracking.enabled", "False", "--trainer.keep-last", "99", "--eval.benchmarks")


@pytest.fixture(scope="module")
def straight(workplace: Path) -> Path:
    """Three epochs of four steps on two ranks, with a checkpoint in the middle of each."""
    training.finish(training.warm_ranks(workplace, "hard", *FLAGS))
    return workplace / "hard"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1])
def test_stopped_within_an_epoch_it_resumes_with_the_same_batches(workplace: Path, straight: Path, ranks: int) -> None:
    folder = workplace / f"hard_{ranks}"
    shutil.copytree(straight / "checkpoints" / "step-00000006", folder / "checkpoints" / "step-00000006")
    training.finish(training.warm_ranks(workplace, folder.name, *FLAGS, "--resume", world_size=ranks))
    stored = [run / "checkpoints" / "step-00000008" / "hard_places.safetensors" for run in (straight, folder)]
    one, other = (load_file(file) for file in stored)
    assert int(one["epoch"]) == 1
    assert one["places_SP"].shape == (4, 4)
    assert int(one["is_hard_S"].sum()) == 2
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[training.logged(run)[step]["train/loss"] for step in (7, 8)] for run in (straight, folder)]
    # sums over another number of ranks are added in another order
    assert losses[0] == losses[1] if ranks == 2 else losses[0] == pytest.approx(losses[1], rel=1e-5)
    if ranks == 2:
        training.same_state(training.last_checkpoint(straight), training.last_checkpoint(folder))
    assert training.logged(straight)[5]["train/hard_encode_s"] > 0
    assert training.logged(straight)[5]["train/hard_compose_s"] > 0
