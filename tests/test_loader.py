"""Place batches: the planned pixels on any number of ranks and threads, and what happens to damaged images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import DataConfig
from data_pipeline.augment import image_seeds, randaugment
from data_pipeline.images import decode
from data_pipeline.index import PlaceRange, ShardIndex, read_index
from data_pipeline.loader import PlaceLoader, TooManyBadImagesError
from data_pipeline.plan import Batching, EpochPlan, plan_epoch
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.photos import write_gsv_cities

CITIES = {"Aachen": {i: 4 + i % 3 for i in range(9)}, "Bergen": dict.fromkeys(range(8), 5)}
P, K = 4, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], list[Path]]]:
    folder = tmp_path_factory.mktemp("native")
    return folder, write_gsv_cities(folder, CITIES)


@pytest.fixture
def index(source: tuple[Path, object], tmp_path: Path) -> ShardIndex:
    write_shards(read_gsv_cities(source[0]), tmp_path / "set", ShardOptions(shard_bytes=30_000))
    return read_index(tmp_path / "set")


def plan_of(index: ShardIndex) -> EpochPlan:
    return plan_epoch(
        index.place_city,
        index.num_views,
        Batching(places_per_batch=P, images_per_place=K, composition="city"),
        seed=0,
        epoch=0,
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without a GPU refuses")
def test_nvjpeg_without_a_gpu_is_refused_in_one_line(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match=r"data\.decode nvjpeg needs an NVIDIA GPU, and torch sees none; use cpu"):
        loader(index, decode="nvjpeg")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG needs an NVIDIA GPU")
def test_nvjpeg_replaces_the_same_damaged_view(index: ShardIndex) -> None:
    plan = plan_of(index)
    damage(index, int(plan.places_SP[0, 1]), int(plan.views_SPK[0, 1, 0]))
    (on_cpu,) = loader(index).batches(plan, range(1))
    reader = loader(index, decode="nvjpeg", decode_threads=1)
    (batch,) = reader.batches(plan, range(1))
    assert batch.images_B3HW.is_cuda
    assert reader.num_bad_images == 1
    assert (batch.images_B3HW.cpu().float() - on_cpu.images_B3HW.float()).abs().mean() < 6  # chroma is not interpolated


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


def test_a_flipped_byte_anywhere_in_a_tar_is_named_or_touches_no_image(
    index: ShardIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(index)
    expected = list(loader(index, decode_threads=2).batches(plan, range(plan.num_steps)))
    planned = {
        (int(p), int(v))
        for p, views in zip(plan.places_SP.ravel(), plan.views_SPK.reshape(-1, K), strict=True)
        for v in views
    }
    rng, named = np.random.default_rng(4), 0
    tar = index.shard_path(0)
    content = tar.read_bytes()
    for position in rng.integers(0, len(content), size=60).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        tar.write_bytes(damaged)
        inside = [
            (place, view)
            for place in range(index.num_places)
            if index.shard_path(place) == tar
            for view, row in enumerate(range(*index.rows(place).indices(index.num_images)))
            if index.offset[row] <= position < index.offset[row] + index.size[row]
        ]
        reader = loader(index, decode_threads=2)
        batches = list(reader.batches(plan, range(plan.num_steps)))
        hit = [image for image in inside if image in planned]
        assert list(reader.bad_images) == hit
        said = capfd.readouterr().err
        assert all(f"{tar}: place {place} view {view}: its bytes differ" in said for place, view in hit)
        named += len(hit)
        for batch, whole in zip(batches, expected, strict=True):
            same = (batch.images_B3HW == whole.images_B3HW).flatten(1).all(dim=1)
            for changed in (~same).nonzero().flatten().tolist():
                assert (int(batch.place_ids_B[changed]), int(batch.views_B[changed])) in hit
    assert named > 5


def test_a_flipped_byte_anywhere_in_the_index_stops_the_run(index: ShardIndex) -> None:
    path = Path(index.location) / "index.parquet"
    content = path.read_bytes()
    for position in np.random.default_rng(5).integers(0, len(content), size=80).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index\.parquet: "):
            read_index(index.location)
    path.write_bytes(content)
    assert read_index(index.location).num_places == index.num_places


class Counting:
    """Places, and which of them were asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.asked: list[PlaceRange] = []

    def place_range(self, place: int) -> PlaceRange:
        self.asked.append(self.index.place_range(place))
        return self.asked[-1]


@pytest.mark.parametrize("limit", [0, 70_000, 10**9])
def test_reads_ahead_by_bytes_and_no_further(index: ShardIndex, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.loader.MB", 1)
    plan, places = plan_of(index), Counting(index)
    reader = loader(index, decode_threads=1, prefetch_batches=1, read_ahead_mb=limit)
    reader.places = places
    next(reader.batches(plan, range(plan.num_steps)))
    steps = [sum(place.length for place in places.asked[i : i + P]) for i in range(0, len(places.asked), P)]
    assert len(steps) >= 2
    if limit == 10**9:
        assert len(steps) == plan.num_steps
    elif limit == 0:
        assert len(steps) == 2
    else:
        assert sum(steps[:-1]) < limit <= sum(steps)
        assert 2 < len(steps) < plan.num_steps
