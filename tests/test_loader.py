"""Place batches: the planned pixels on any number of ranks and threads, and what happens to damaged images."""

from pathlib import Path

import pytest
import torch

from configs.schema import DataConfig
from data_pipeline.augment import image_seeds, randaugment
from data_pipeline.gsv_cities import read_gsv_cities
from data_pipeline.images import decode
from data_pipeline.index import ShardIndex, read_index
from data_pipeline.loader import PlaceLoader, TooManyBadImagesError
from data_pipeline.plan import EpochPlan, plan_epoch
from data_pipeline.shards import write_shards
from tests.photos import write_gsv_cities

CITIES = {"Aachen": {i: 4 + i % 3 for i in range(9)}, "Bergen": dict.fromkeys(range(8), 5)}
P, K = 4, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], list[Path]]]:
    folder = tmp_path_factory.mktemp("native")
    return folder, write_gsv_cities(folder, CITIES)


@pytest.fixture
def index(source: tuple[Path, object], tmp_path: Path) -> ShardIndex:
    write_shards(read_gsv_cities(source[0]), tmp_path / "set", shard_bytes=30_000)
    return read_index(tmp_path / "set")


def plan_of(index: ShardIndex) -> EpochPlan:
    return plan_epoch(
        index.place_city,
        index.num_views,
        seed=0,
        epoch=0,
        places_per_batch=P,
        images_per_place=K,
        composition="city",
    )


def config(**changes: object) -> DataConfig:
    options: dict = {"image_size": 28, "places_per_batch": P, "images_per_place": K, "decode_threads": 0}
    return DataConfig(**(options | changes))


def loader(index: ShardIndex, rank: int = 0, world: int = 1, **changes: object) -> PlaceLoader:
    return PlaceLoader(index, config(**changes), rank=rank, world_size=world)


def test_pixels_are_those_of_the_source_files(
    index: ShardIndex, source: tuple[Path, dict[tuple[str, int], list[Path]]]
) -> None:
    plan = plan_of(index)
    places = sorted(source[1])
    for step, batch in enumerate(loader(index).batches(plan, range(plan.num_steps))):
        assert batch.images_B3HW.dtype == torch.uint8
        assert batch.images_B3HW.shape == (P * K, 3, 28, 28)
        assert batch.place_ids_B.tolist() == plan.places_SP[step].repeat(K).tolist()
        for image, place, view in zip(batch.images_B3HW, batch.place_ids_B, batch.views_B, strict=True):
            file = source[1][places[int(place)]][int(view)]
            assert torch.equal(image, decode(file.read_bytes(), 28))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batch_is_the_same_on_any_ranks_and_threads(index: ShardIndex, world: int, threads: int) -> None:
    plan = plan_of(index)
    expected = list(loader(index).batches(plan, range(plan.num_steps)))
    ranks = [loader(index, r, world, decode_threads=threads).batches(plan, range(plan.num_steps)) for r in range(world)]
    for whole, *shares in zip(expected, *ranks, strict=True):
        for name in ("images_B3HW", "place_ids_B", "views_B"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(s, name) for s in shares]))


def test_starting_late_gives_the_rest(index: ShardIndex) -> None:
    plan = plan_of(index)
    everything = list(loader(index, decode_threads=2).batches(plan, range(plan.num_steps)))
    rest = list(loader(index, decode_threads=2).batches(plan, range(2, plan.num_steps)))
    assert len(rest) == len(everything) - 2
    assert torch.equal(rest[0].images_B3HW, everything[2].images_B3HW)


def damage(index: ShardIndex, place: int, view: int) -> None:
    row = index.rows(place).start + view
    with index.shard_path(place).open("r+b") as tar:
        tar.seek(int(index.offset[row] + index.size[row] // 2))
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 0x55]))


def test_damaged_view_is_replaced_by_the_next_named_and_counted(
    index: ShardIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(index)
    place, view = int(plan.places_SP[0, 1]), int(plan.views_SPK[0, 1, 0])
    (before,) = loader(index).batches(plan, range(1))
    damage(index, place, view)
    for threads in (0, 2):
        reader = loader(index, decode_threads=threads)
        (batch,) = reader.batches(plan, range(1))
        assert reader.num_bad_images == 1
        assert f"place {place} view {view}: its bytes differ" in capfd.readouterr().err
        changed = (batch.images_B3HW != before.images_B3HW).flatten(1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [K]


def test_too_many_damaged_images_stop_the_run(index: ShardIndex) -> None:
    plan = plan_of(index)
    for place in plan.places_SP[0].tolist():
        for view in range(int(index.num_views[place])):
            damage(index, place, view)
    with pytest.raises(TooManyBadImagesError, match=r"more than data\.max_bad_images 2"):
        list(loader(index, max_bad_images=2).batches(plan, range(1)))
    with pytest.raises(TooManyBadImagesError, match="no readable image left"):
        list(loader(index, decode_threads=2).batches(plan, range(1)))


def test_augmentation_depends_on_the_image_alone() -> None:
    images = torch.randint(0, 256, (6, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids, views = torch.tensor([5, 5, 9, 9, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1])
    seeds = image_seeds(0, 3, ids, views)
    assert len(set(seeds)) == 6
    assert seeds != image_seeds(0, 4, ids, views)
    state = torch.random.get_rng_state()
    whole = randaugment(images, seeds, num_ops=3, magnitude=15)
    assert torch.equal(state, torch.random.get_rng_state())
    halves = [randaugment(images[part], seeds[part], num_ops=3, magnitude=15) for part in (slice(0, 3), slice(3, 6))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, images)
