"""Several shard sets as one numbering of places, and the epoch plans of a recipe over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from configs.reading import shown
from configs.schema import DataConfig
from data_pipeline.hard_plan import hard_faults
from data_pipeline.index import PlaceRange, ShardIndex
from data_pipeline.index_copy import open_index
from data_pipeline.place_positions import position_fault
from data_pipeline.plan import (
    Batching,
    EpochPlan,
    Int64,
    batch_faults,
    held_out_places,
    plan_epoch,
    visits_of_epoch,
)
from data_pipeline.storage import RangeReader
from data_pipeline.stream_plan import Resumed, plan_stream, read_again, tar_order
from data_pipeline.sub_batches import SetPlaces, plan_sets


class PlaceMixture:
    """Shard sets with a weight each: how often an epoch sees the places of a set, on average.

    Place ids and city numbers count on from set to set, so that equal ids mean one place and a batch of one city is of
    one set. num_views and place_city are int64 [n]; `cities` has the names by number.
    """

    def __init__(self, sets: Sequence[ShardIndex], weights: Sequence[float]) -> None:
        self.sets, self.weights = list(sets), list(weights)
        self.first_place = np.cumsum([0, *(index.num_places for index in sets)])
        first_city = np.cumsum([0, *(len(index.cities) for index in sets)])
        self.num_views = _joined([index.num_views for index in sets])
        self.place_city = _joined(
            [
                index.place_city + first if first else index.place_city
                for index, first in zip(sets, first_city, strict=False)
            ]
        )
        self.cities = [city for index in sets for city in index.cities]

    @property
    def num_places(self) -> int:
        """Places in all sets."""
        return len(self.num_views)

    @property
    def num_images(self) -> int:
        """Images in all sets."""
        return sum(index.num_images for index in self.sets)

    @property
    def digest(self) -> str:
        """16 hex digits of what is trained on: the contents of the sets, their order and weights, not their locations.

        Of one set with weight 1 it is the set's own; no tar is read.
        """
        if len(self.sets) == 1 and self.weights == [1]:
            return self.sets[0].digest
        parts = [[index.digest, float(weight)] for index, weight in zip(self.sets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def place_range(self, place_id: int) -> PlaceRange:
        """Where the views of a place lie."""
        number = int(np.searchsorted(self.first_place, place_id, side="right")) - 1
        return self.sets[number].place_range(place_id - int(self.first_place[number]))

    def visits(self, *, seed: int, epoch: int) -> Int64 | None:
        """Times that an epoch sees each place, int64 [n]; None where each comes once."""
        if all(weight == 1 for weight in self.weights):
            return None
        parts = [
            visits_of_epoch(index.num_places, weight, seed=seed, epoch=epoch, stream=number)
            for number, (index, weight) in enumerate(zip(self.sets, self.weights, strict=True))
        ]
        return np.concatenate(parts)


def read_mixture(data: DataConfig, reader: RangeReader | None = None) -> PlaceMixture:
    """The shard sets that a recipe names: those of data.sets, or data.shards (weight 1), then data.mix."""
    if data.shards in data.mix:
        raise ValueError(f"data.mix names {data.shards}, which data.shards names already; use data.repeat")
    locations = list(data.locations.values())
    reader = reader or RangeReader(retry_s=data.remote_retry_s)
    sets = [open_index(location, reader, folder=data.index_cache) for location in locations]
    return PlaceMixture(sets, [data.mix.get(location, 1.0) for location in locations])


def _joined(parts: list[Int64]) -> Int64:
    """The arrays one after the other; one alone is not copied, so that it stays mapped."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class EpochPlans:
    """The epoch plans of a recipe's data, planned when asked for; every epoch has `num_steps` steps."""

    def __init__(self, places: PlaceMixture, data: DataConfig, *, seed: int) -> None:
        """Raises ValueError for all that the places have not enough of, a line each."""
        faults = []
        if unknown := sorted(set(data.repeat) - set(places.cities)):
            faults.append(
                f"data.repeat names {unknown[0]}; the shard set has {shown(', '.join(places.cities))}; --data.repeat "
                "alone empties it"
            )
        if data.repeat and any(weight % 1 for weight in places.weights):
            faults.append("data.repeat needs whole weights in data.mix; leave one of them out")
        self.places, self.seed, self.data = places, seed, data
        self.repeat = {n: data.repeat[city] for n, city in enumerate(places.cities) if city in data.repeat}
        self.held_out = held_out_places(places.num_places, data.held_out, seed=seed)
        if faults:
            seen = np.ones(places.num_places, dtype=np.int64)
            seen[self.held_out] = 0
            raise ValueError("\n".join([*faults, *batch_faults(places.num_views, seen, self._batching())]))
        self._tars = tar_order(places.sets) if data.access == "stream" else None
        self._planned: tuple[int, EpochPlan] | None = None  # the last, which is asked for again at the start
        self.num_steps = self.epoch(0).num_steps
        num_trained = places.num_places - len(self.held_out)
        faults = hard_faults(data, num_trained, self.num_steps, places.weights)
        if data.hard_share and data.hard_min_m and (fault := position_fault(places.sets, "data.hard_min_m")):
            faults.append(fault)
        if faults:
            raise ValueError("\n".join(faults))

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = None  # no two at a time
            self._planned = epoch, self._plan(epoch)
        return self._planned[1]

    def read_again(self, step: int) -> Resumed | None:
        """What a run that begins with this step of an epoch (0 is the first) reads twice; None where nothing is."""
        epoch, step_of_epoch = divmod(step, self.num_steps)
        return read_again(self.epoch(epoch), self._tars, step_of_epoch) if self._tars and step_of_epoch else None

    def _plan(self, epoch: int) -> EpochPlan:
        if self._tars:
            return plan_stream(
                self._tars,
                self.places.num_views,
                self._batching(),
                lanes=self.data.stream_lanes,
                buffer_places=self.data.stream_buffer_places,
                seed=self.seed,
                epoch=epoch,
                visits=self._visits(epoch),
            )
        data = self.data
        if data.composition == "sets":
            parts = list(data.places_of_sets.values())
            return plan_sets(self._sets(), parts, data.images_per_place, data.sub_batch, seed=self.seed, epoch=epoch)
        return self.of_visits(epoch, self._visits(epoch))

    def of_visits(self, epoch: int, visits: Int64 | None) -> EpochPlan:
        """A plan of other visits to each place, int64 [n], than the epoch's, drawn as the epoch's is."""
        return plan_epoch(
            self.places.place_city,
            self.places.num_views,
            self._batching(),
            seed=self.seed,
            epoch=epoch,
            visits=visits,
        )

    def visits(self, epoch: int) -> Int64:
        """Times that an epoch sees each place, int64 [n]; repeated cities are not counted."""
        visits = self._visits(epoch)
        return np.ones(self.places.num_places, dtype=np.int64) if visits is None else visits

    @property
    def digest(self) -> str:
        """16 hex digits of what is trained on: the mixture's own, or with the places that are held out of it."""
        if not len(self.held_out):
            return self.places.digest
        return hashlib.sha256(f"{self.places.digest} {self.held_out.tolist()}".encode()).hexdigest()[:16]

    def steps_of_rounds(self) -> dict[str, int]:
        """Steps in which all places of each of data.sets are seen, but for the last that make no batch."""
        parts = self.data.places_of_sets
        return {one.name: one.steps_of_round(parts[one.name]) for one in self._sets()} if parts else {}

    def _sets(self) -> list[SetPlaces]:
        """The places of each of data.sets."""
        trained = np.ones(self.places.num_places, dtype=np.bool_)
        trained[self.held_out] = False
        sets = []
        for number, name in enumerate(self.data.sets):
            first, last = self.places.first_place[number : number + 2].tolist()
            part = slice(first, last)
            sets.append(
                SetPlaces(name, first, self.places.place_city[part], self.places.num_views[part], trained[part])
            )
        return sets

    def _visits(self, epoch: int) -> Int64 | None:
        visits = self.places.visits(seed=self.seed, epoch=epoch)
        if len(self.held_out):
            visits = np.ones(self.places.num_places, dtype=np.int64) if visits is None else visits.copy()
            visits[self.held_out] = 0
        return visits

    def _batching(self) -> Batching:
        return Batching(
            places_per_batch=self.data.places_per_batch,
            images_per_place=self.data.images_per_place,
            composition=self.data.composition,
            repeat=self.repeat,
        )
