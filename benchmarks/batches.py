"""Batches without end, for what measures a loader or a step."""

from __future__ import annotations

from collections.abc import Generator

from configs.schema import DataConfig
from data_pipeline.loader import PlaceBatch, PlaceLoader, build_reader
from data_pipeline.mixture import EpochPlans, read_mixture


def plans_and_loader(data: DataConfig, *, rank: int = 0, world_size: int = 1) -> tuple[EpochPlans, PlaceLoader]:
    """The epoch plans of a recipe's data, and a rank's loader of what they plan."""
    reader = build_reader(data, rank=rank)
    places = read_mixture(data, reader)
    plans = EpochPlans(places, data, seed=0)
    return plans, PlaceLoader(places, data, rank=rank, world_size=world_size, reader=reader)


def endless(plans: EpochPlans, loader: PlaceLoader) -> Generator[PlaceBatch, None, None]:
    """Batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.batches(plans.epoch(epoch), range(plans.num_steps))
        epoch += 1
