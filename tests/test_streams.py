"""Whole tars in order by webdataset: the bytes of range reads, on any ranks, after any resume, of damaged tars too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import recipe_text
from configs.schema import DataConfig, Recipe
from data_pipeline.listing import shuffle_places
from data_pipeline.loader import PlaceBatch, PlaceLoader, TooManyBadImagesError, build_reader
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.storage import StorageError
from tests.http_ranges import KillableServer
from tests.photos import write_gsv_cities
from trainer.manifest import CheckpointError
from trainer.recipe_changes import recipe_changes

CITIES = {"Aachen": {i: 4 + i % 3 for i in range(30)}, "St-Gallen_2": dict.fromkeys(range(31), 4)}
P, K = 8, 3


@pytest.fixture(scope="module", params=[None, 3], ids=["in order", "mixed"])
def shards(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_gsv_cities(folder / "native", CITIES)
    listing = read_gsv_cities(folder / "native")
    listing = shuffle_places(listing, request.param) if request.param else listing
    write_shards(listing, folder / "set", ShardOptions(shard_bytes=20_000))
    return folder / "set"


def config(location: object, **changes: object) -> DataConfig:
    options: dict = {
        **{"shards": str(location), "access": "stream", "composition": "mixed", "stream_buffer_places": 16},
        **{"image_size": 28, "places_per_batch": P, "images_per_place": K, "decode_threads": 2, "read_ahead_mb": 0},
    }
    return DataConfig(**(options | changes))


def open_set(data: DataConfig, rank: int = 0, world: int = 1) -> tuple[PlaceMixture, EpochPlans, PlaceLoader]:
    reader = build_reader(data)
    places = read_mixture(data, reader)
    return (
        places,
        EpochPlans(places, data, seed=0),
        PlaceLoader(places, data, rank=rank, world_size=world, reader=reader),
    )


def batches(data: DataConfig, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[PlaceBatch]:
    _, plans, loader = open_set(data, rank, world)
    return loader.batches(plans.epoch(0), range(first, plans.num_steps))


def read_by_ranges(data: DataConfig) -> list[PlaceBatch]:
    """The same plan, each place read alone."""
    places, plans, _ = open_set(data)
    by_ranges = data.model_copy(update={"access": "ranges"})
    plan = plans.epoch(0)
    alone = type(plan)(plan.places_SP, plan.views_of)
    return list(PlaceLoader(places, by_ranges, rank=0, world_size=1).batches(alone, range(plan.num_steps)))


def assert_same(some: list[PlaceBatch], others: list[PlaceBatch]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.place_ids_B, other.place_ids_B)
        assert torch.equal(one.views_B, other.views_B)
        assert torch.equal(one.images_B3HW, other.images_B3HW)


@pytest.mark.parametrize("threads", [0, 2])
def test_streams_give_the_pixels_of_range_reads(shards: Path, threads: int) -> None:
    data = config(shards, decode_threads=threads)
    assert_same(list(batches(data)), read_by_ranges(data))


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_global_batch_is_the_same_on_any_ranks_and_after_any_resume(shards: Path, lanes: int) -> None:
    data = config(shards, stream_lanes=lanes)
    expected = list(batches(data))
    for world in (2, 4, 8):
        ranks = [list(batches(data, rank=rank, world=world)) for rank in range(world)]
        for step, whole in enumerate(expected):
            for name in ("images_B3HW", "place_ids_B", "views_B"):
                assert torch.equal(getattr(whole, name), torch.cat([getattr(rank[step], name) for rank in ranks]))
    for first in range(1, len(expected)):
        assert_same(list(batches(data, first)), expected[first:])


def test_each_tar_is_read_once_and_what_is_unused_is_counted(shards: Path) -> None:
    read = used = 0
    for rank in range(2):
        places, plans, loader = open_set(config(shards, stream_lanes=2), rank, 2)
        list(loader.batches(plans.epoch(0), range(plans.num_steps)))
        assert loader.streamed.unused_bytes == loader.streamed.read_bytes - loader.streamed.used_bytes > 0
        read, used = read + loader.streamed.read_bytes, used + loader.streamed.used_bytes
    plan, total = plans.epoch(0), sum(shard.size for shard in places.sets[0].metadata.shards)
    assert used == sum(places.place_range(int(place)).length for place in plan.places_SP.ravel())
    assert used < read < total


def test_a_resume_begins_behind_what_was_given(shards: Path) -> None:
    _, plans, loader = open_set(config(shards))
    last = plans.num_steps - 1
    list(loader.batches(plans.epoch(0), range(last, last + 1)))
    _, _, whole = open_set(config(shards))
    list(whole.batches(plans.epoch(0), range(plans.num_steps)))
    assert loader.streamed.read_bytes < whole.streamed.read_bytes / 2
    again = plans.read_again(last)
    assert again is not None
    assert 0 < again.places <= 16
    assert plans.read_again(plans.num_steps) is None


def test_held_out_and_unvisited_places_are_passed_over(shards: Path, tmp_path: Path) -> None:
    write_gsv_cities(tmp_path / "native", {"Oslo": dict.fromkeys(range(16), 4)}, seed=9)
    write_shards(read_gsv_cities(tmp_path / "native"), tmp_path / "set", ShardOptions(shard_bytes=20_000))
    data = config(shards, mix={str(tmp_path / "set"): 0.5}, held_out=0.2)
    _, plans, _ = open_set(data)
    seen = torch.cat([batch.place_ids_B for batch in batches(data)]).unique()
    assert not np.isin(plans.held_out, seen.numpy()).any()
    assert (seen >= 61).sum() <= 8
    assert_same(list(batches(data)), read_by_ranges(data))


# Faults: the rules of range reads


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "set")
    return tmp_path / "set"


def ends(batches: Iterator[PlaceBatch]) -> tuple[list[PlaceBatch], str]:
    """All batches up to the end, and what ended them."""
    found: list[PlaceBatch] = []
    try:
        for batch in batches:
            found.append(batch)
    except TooManyBadImagesError as error:
        return found, str(error)
    return found, ""


def same_ends(data: DataConfig, capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Asserts that streams name and replace what range reads do; what was said, and what ended both."""
    places, plans, streaming = open_set(data)
    plan = plans.epoch(0)
    streamed, why = ends(streaming.batches(plan, range(plan.num_steps)))
    said = capfd.readouterr().err
    alone = PlaceLoader(places, data.model_copy(update={"access": "ranges"}), rank=0, world_size=1)
    expected, other = ends(alone.batches(type(plan)(plan.places_SP, plan.views_of), range(plan.num_steps)))
    assert why == other
    assert sorted(said.splitlines()) == sorted(capfd.readouterr().err.splitlines())
    assert streaming.bad_images == alone.bad_images
    for one, same in zip(streamed, expected, strict=True):
        assert torch.equal(one.images_B3HW, same.images_B3HW)
    return said, why


def test_a_bad_photograph_is_replaced_as_by_ranges(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = config(own, decode_threads=0)
    places, plans, _ = open_set(data)
    planned = places.place_range(int(plans.epoch(0).places_SP[1, 2]))
    view = int(plans.epoch(0).views_SPK[1, 2, 0])
    with Path(planned.location).open("r+b") as tar:
        tar.seek(planned.start + int(planned.offsets[view]) + 50)
        tar.write(b"damaged")
    said, why = same_ends(data, capfd)
    assert "its bytes differ from the index's crc32" in said
    assert why == ""


@pytest.mark.parametrize("damage", ["header", "cut", "gone", "zeros"])
def test_a_damaged_tar_ends_or_goes_on_as_by_ranges(own: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = config(own, decode_threads=0, max_bad_images=10**6)
    places, _, _ = open_set(data)
    tar = own / places.sets[0].metadata.shards[1].name
    content = bytearray(tar.read_bytes())
    if damage == "gone":
        tar.unlink()
        with pytest.raises(FileNotFoundError, match="the index names it, but it is not there"):
            list(batches(data))
        return
    if damage == "header":
        content[8:20] = b"no name here"
    elif damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[: len(content) // 2] = bytes(len(content) // 2)
    tar.write_bytes(content)
    said, why = same_ends(data, capfd)
    if damage == "header":
        assert (said, why) == ("", "")  # a range read sees no header, and what a stream does not give is read so
    else:
        assert "its bytes differ" in said
        assert "no readable image left" in why


@pytest.mark.parametrize("options", [(), ("ignore-ranges",)])
def test_http_serves_streams_by_few_requests_or_whole_tars(
    shards: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = KillableServer(shards, *options)
    server.start()
    try:
        for request in (10_000, 16 * 2**20):
            monkeypatch.setattr("data_pipeline.stream.REQUEST_BYTES", request)
            assert_same(list(batches(config(server.url))), list(batches(config(shards))))
    finally:
        server.kill()


def test_a_server_cut_for_good_is_named(shards: Path) -> None:
    server = KillableServer(shards)
    server.start()
    stream = batches(config(server.url, prefetch_batches=1, remote_retry_s=1.0, stream_buffer_places=4))
    next(stream)
    server.kill()
    with pytest.raises(StorageError, match=r"^http://[^ ]*/shards/train-0000\d\d\.tar: cannot be read"):
        list(stream)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"composition": "city"}, "data.composition city needs data.access ranges, else use mixed"),
        ({"stream_lanes": 3}, "data.stream_lanes 3 does not divide data.places_per_batch 8; use 2"),
        ({"mix": {"other": 2.0}}, "weight 2 of other: data.access stream reads each tar once"),
        ({"cache": "kept"}, "leave one of them out"),
        ({"hard_share": 0.5}, "data.hard_share 0.5 chooses places from all tars"),
    ],
)
def test_recipes_that_streams_cannot_follow_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config("somewhere", **changes)


def test_a_resume_with_another_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.recipe_changes.plugin_changes", lambda recipe, checkpoint: {})  # of a whole checkpoint

    def recipe(**data: object) -> Recipe:
        return Recipe.model_validate({"data": {"composition": "mixed", **data}})

    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe(access="stream")))
    for other in (recipe(access="stream", stream_buffer_places=9), recipe(access="stream", stream_lanes=2), recipe()):
        with pytest.raises(CheckpointError, match=r"was trained with data\.(access|stream_)"):
            recipe_changes(other, tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe()))
    assert list(recipe_changes(recipe(stream_lanes=2), tmp_path)) == ["data.stream_lanes"]  # which ranges do not have
