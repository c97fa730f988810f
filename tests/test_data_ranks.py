"""Ids, views and augmented pixels of every global step: the same on 1, 2 and 4 processes, any threads, any resume."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from configs.schema import DataConfig
from data_pipeline.augment import image_seeds, randaugment
from data_pipeline.loader import PlaceLoader
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.photos import write_gsv_cities
from tests.ranks import on_ranks

SEED, EPOCH, P, K = 5, 2, 8, 3


@functools.cache
def data() -> tuple[PlaceMixture, EpochPlans]:
    """Two shard sets, one of them with a fractional weight, written once by rank 0 and read by all."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(str(folders[0]))
    if dist.get_rank() == 0:
        for name, cities in {"one": {"A": dict.fromkeys(range(20), 5), "B": {i: 4 + i % 3 for i in range(17)}},
                             "two": {"C": dict.fromkeys(range(24), 4)}}.items():  # fmt: skip
            write_gsv_cities(folder / name / "native", cities, seed=len(cities))
            write_shards(
                read_gsv_cities(folder / name / "native"), folder / name / "set", ShardOptions(shard_bytes=30_000)
            )
    dist.barrier()
    config = config_of(folder, 0)
    places = read_mixture(config)
    for index in places.sets:
        assert index.num_images
    return places, EpochPlans(places, config, seed=SEED)


def config_of(folder: Path, threads: int) -> DataConfig:
    return DataConfig(
        shards=str(folder / "one" / "set"),
        mix={str(folder / "two" / "set"): 0.5},
        places_per_batch=P,
        images_per_place=K,
        image_size=42,
        decode_threads=threads,
        read_ahead_mb=0 if threads == 1 else 64,
    )


def digests(rank: int, world_size: int, threads: int, steps: Iterable[int], *, gather: bool) -> list[str]:
    """sha256 of each global step: ids, views and augmented pixels, put together from all ranks' shares if `gather`."""
    places, plans = data()
    folder = Path(places.sets[0].location).parent.parent
    loader = PlaceLoader(places, config_of(folder, threads), rank=rank, world_size=world_size)
    found = []
    for batch in loader.batches(plans.epoch(EPOCH), steps):
        seeds = image_seeds(SEED, EPOCH, batch.place_ids_B, batch.views_B)
        parts = [
            randaugment(batch.images_B3HW, seeds, num_ops=3, magnitude=15),
            batch.place_ids_B,
            batch.views_B,
        ]
        if gather:
            shares = [[torch.empty_like(part) for _ in range(world_size)] for part in parts]
            for share, part in zip(shares, parts, strict=True):
                dist.all_gather(share, part)
            parts = [torch.cat(share) for share in shares]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


@functools.cache
def expected() -> list[str]:
    """Every step as one reader without threads sees it."""
    return digests(0, 1, 0, range(data()[1].num_steps), gather=False)


def check_steps_are_the_same_for_any_threads() -> None:
    assert len(expected()) == data()[1].num_steps == (37 + 12) // P
    assert len(set(expected())) == len(expected())
    for threads in (0, 1, 3):
        assert (
            digests(dist.get_rank(), dist.get_world_size(), threads, range(len(expected())), gather=True) == expected()
        )


def check_a_resume_at_another_world_size_goes_on_with_the_next_step() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    first = digests(rank, world, 2, range(3), gather=True)
    # The other world size: as many readers as it has ranks, spread over the processes there are.
    for other in (1, 2, 4, 8):
        places, plans = data()
        folder = Path(places.sets[0].location).parent.parent
        shares = []
        for reader in range(other):
            loader = PlaceLoader(places, config_of(folder, 1), rank=reader, world_size=other)
            shares.append(list(loader.batches(plans.epoch(EPOCH), range(3, plans.num_steps))))
        rest = []
        for batches in zip(*shares, strict=True):
            ids, views = (torch.cat([getattr(b, name) for b in batches]) for name in ("place_ids_B", "views_B"))
            images = torch.cat([
                randaugment(b.images_B3HW, image_seeds(SEED, EPOCH, b.place_ids_B, b.views_B), num_ops=3, magnitude=15)
                for b in batches
            ])  # fmt: skip
            digest = hashlib.sha256()
            for part in (images, ids, views):
                digest.update(part.numpy().tobytes())
            rest.append(digest.hexdigest())
        assert first + rest == expected()


def check_resume_costs_no_reading_of_what_was_seen() -> None:
    places, plans = data()
    folder = Path(places.sets[0].location).parent.parent
    loader = PlaceLoader(places, config_of(folder, 0), rank=0, world_size=1)
    read: list[int] = []
    plain = loader.reader.read

    def counted(location: str, start: int, length: int, **options: object) -> bytes:
        read.append(start)
        return plain(location, start, length, **options)  # type: ignore[arg-type]

    loader.reader.read = counted  # type: ignore[method-assign]
    list(loader.batches(plans.epoch(EPOCH), range(plans.num_steps - 1, plans.num_steps)))
    assert len(read) == P
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


test_on_ranks = on_ranks(__file__)
