"""Composition `sets`: every step has a part from each data set, and each set its own order of places.

A set is gone through in rounds, each planned like an epoch of that set alone; a round begins when the one before is at
its end, whatever the epoch. An epoch is as long as the longest round.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan import Batching, EpochPlan, Int64, plan_epoch


@dataclass(frozen=True)
class SetPlaces:
    """Places of a data set, n of them counted from `first_place`: city and number of views of each (int64 [n]).

    `trained` (bool [n]) are those that are not held out.
    """

    name: str
    first_place: int
    place_city: Int64
    num_views: Int64
    trained: NDArray[np.bool_]

    def steps_of_round(self, places_per_batch: int) -> int:
        """Sub-batches until all of them were seen, but for the last incomplete one."""
        return int(np.count_nonzero(self.trained)) // places_per_batch


def sub_batch_faults(sets: Sequence[SetPlaces], places_of_sets: Sequence[int], images_per_place: int) -> list[str]:
    """Why sets cannot give so many places to each step, a line each."""
    faults = []
    for one, wanted in zip(sets, places_of_sets, strict=True):
        trained = int(np.count_nonzero(one.trained))
        if trained < wanted:
            faults.append(
                f"data.sets {one.name}: {trained} places are fewer than the {wanted} that a batch takes of it; lower "
                "data.places_per_batch, or say in data.set_places how many"
            )
        if one.num_views.min() < images_per_place:
            place = int(one.num_views.argmin())
            faults.append(
                f"data.sets {one.name}: place {place} has {one.num_views[place]} views, fewer than "
                f"data.images_per_place {images_per_place}; use at most {one.num_views[place]} or shard with "
                f"--min-images-per-place {images_per_place}"
            )
    return faults


def plan_sets(
    sets: Sequence[SetPlaces],
    places_of_sets: Sequence[int],
    images_per_place: int,
    composition: str,
    *,
    seed: int,
    epoch: int,
) -> EpochPlan:
    """The plan of one epoch: each step has `places_of_sets` places of the sets, those of a set as `composition` says.

    A step consists of equal blocks, as many as the greatest divisor of all `places_of_sets` says, so that any number of
    ranks that divides it has equally many places of each set on every rank. Nothing about ranks enters.
    Raises ValueError for what `sub_batch_faults` finds.
    """
    if faults := sub_batch_faults(sets, places_of_sets, images_per_place):
        raise ValueError("\n".join(faults))
    num_steps = max(one.steps_of_round(p) for one, p in zip(sets, places_of_sets, strict=True))
    steps = range(epoch * num_steps, (epoch + 1) * num_steps)
    parts = [
        _part_of_steps(one, Batching(p, images_per_place, composition), number, steps, seed)
        for number, (one, p) in enumerate(zip(sets, places_of_sets, strict=True))
    ]
    blocks, total = math.gcd(*places_of_sets), sum(places_of_sets)

    def views_of(steps: slice) -> Int64:
        views = [part.views_of(steps) for part in parts]
        shape = [
            (len(of_set), blocks, p // blocks, images_per_place)
            for of_set, p in zip(views, places_of_sets, strict=True)
        ]
        laid_out = [of_set.reshape(s) for of_set, s in zip(views, shape, strict=True)]
        return np.concatenate(laid_out, axis=2).reshape(-1, total, images_per_place)

    places = [
        (part.places_SP + one.first_place).reshape(num_steps, blocks, -1) for part, one in zip(parts, sets, strict=True)
    ]
    return EpochPlan(np.concatenate(places, axis=2).reshape(num_steps, total), views_of)


@dataclass(frozen=True)
class _Round:
    """The steps of an epoch, from `start` on, that a round of a set gives its places to."""

    start: int
    steps: slice  # of the round's own plan
    plan: EpochPlan


def _part_of_steps(one: SetPlaces, batching: Batching, number: int, steps: range, seed: int) -> EpochPlan:
    """A set's part of these steps of a training, the first of which is 0."""
    of_round = one.steps_of_round(batching.places_per_batch)
    visits = None if one.trained.all() else one.trained.astype(np.int64)
    rounds, step = [], steps.start
    while step < steps.stop:
        turn, offset = divmod(step, of_round)
        part = slice(offset, min(of_round, offset + steps.stop - step))
        plan = plan_epoch(one.place_city, one.num_views, batching, seed=seed, epoch=turn, visits=visits, of_set=number)
        rounds.append(_Round(step - steps.start, part, plan))
        step += part.stop - part.start
    starts = [one_round.start for one_round in rounds]

    def views_of(wanted: slice) -> Int64:
        first, stop, _ = wanted.indices(len(steps))
        views = [np.zeros((0, batching.places_per_batch, batching.images_per_place), np.int64)]
        while first < stop:
            found = rounds[bisect.bisect_right(starts, first) - 1]
            begin = first - found.start + found.steps.start
            end = min(found.steps.stop, begin + stop - first)
            views.append(found.plan.views_of(slice(begin, end)))
            first += end - begin
        return np.concatenate(views)

    return EpochPlan(np.concatenate([found.plan.places_SP[found.steps] for found in rounds]), views_of)
