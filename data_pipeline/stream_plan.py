"""The epoch plan of tars that are read whole, one after the other: which places a batch takes from what was read.

The tars of an epoch, in a random order, are one long row of places, cut into equal lanes. Each lane mixes its places
within a window and gives the same part of every batch, so a rank reads the lanes of its part and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.index import ShardIndex
from data_pipeline.plan import Batching, DrawnViews, EpochPlan, Int64, batch_faults, random_order

_STREAM = 2**20 + 2  # of draws, beside those of other plans
_AT_ONCE = 2**16


@dataclass(frozen=True)
class TarOrder:
    """Places in the order of their bytes: those of tar t are `order[starts[t] : starts[t + 1]]`.

    `order` is None where it is that of their numbers, as `shard` writes them unless it was told to mix.
    """

    starts: Int64
    order: Int64 | None


def tar_order(sets: Sequence[ShardIndex]) -> TarOrder:
    """The order of places in the tars of shard sets, whose places and tars count on from set to set."""
    counts = [np.bincount(index.place_shard, minlength=len(index.metadata.shards)) for index in sets]
    starts = np.cumsum(np.concatenate([[0], *counts]))
    if all(_is_in_order(index) for index in sets):
        return TarOrder(starts, None)
    first, parts = 0, []
    for index in sets:
        parts.append(first + np.lexsort((index.offset[index.place_starts[:-1]], index.place_shard)))
        first += index.num_places
    return TarOrder(starts, np.concatenate(parts))


def _is_in_order(index: ShardIndex) -> bool:
    for start in range(0, index.num_places, _AT_ONCE):
        part = slice(start, start + _AT_ONCE + 1)
        first = index.place_starts[:-1][part]
        if index.check_rows:
            index.check_rows(slice(int(first[0]), int(first[-1]) + 1))
        shard, offset = index.place_shard[part], index.offset[first]
        same = shard[1:] == shard[:-1]
        if not ((shard[1:] > shard[:-1]) | (same & (offset[1:] > offset[:-1]))).all():
            return False
    return True


def plan_stream(
    tars: TarOrder,
    num_views: Int64,
    batching: Batching,
    *,
    lanes: int,
    buffer_places: int,
    seed: int,
    epoch: int,
    visits: Int64 | None = None,
) -> EpochPlan:
    """The plan of an epoch that reads each tar once, given each place's number of views (int64 [n]).

    Each of L lanes gives P/L places to every batch, out of at most buffer_places/L that it has read and not yet given.
    Places with `visits` 0 are passed over; the last incomplete batch is dropped, of other tars each epoch. Nothing
    about ranks, threads or resume enters. Raises ValueError where there are fewer places than a batch takes, a place
    has fewer than K views, or lanes do not divide P.
    """
    p, k = batching.places_per_batch, batching.images_per_place
    faults = batch_faults(num_views, visits, batching)
    if p % lanes:
        faults.append(f"data.stream_lanes {lanes} does not divide data.places_per_batch {p}; use a divisor, such as 1")
    if faults:
        raise ValueError("\n".join(faults))
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch], spawn_key=(_STREAM,)))
    row = _row_of_places(tars, random_order(len(tars.starts) - 1, bits))
    if visits is not None:
        row = row[visits[row] > 0]
    steps, share = len(row) // p, p // lanes
    reading_LM = row[: steps * p].reshape(lanes, -1)
    places_SP = np.empty((steps, p), dtype=np.int64)
    for lane, reading_M in enumerate(reading_LM):
        mixed = reading_M[_mixed(len(reading_M), max(1, buffer_places // lanes), bits)]
        places_SP[:, lane * share : (lane + 1) * share] = mixed.reshape(steps, share)
    return EpochPlan(places_SP, DrawnViews(places_SP, num_views, k, bits), reading_LM)


def _row_of_places(tars: TarOrder, order: Int64) -> Int64:
    """The places of all tars, tars in `order`."""
    lengths = np.diff(tars.starts)[order]
    before = np.cumsum(lengths) - lengths
    row = np.repeat(tars.starts[:-1][order] - before, lengths)
    row += np.arange(len(row))
    return row if tars.order is None else tars.order[row]


def _mixed(count: int, window: int, bits: np.random.Philox) -> Int64:
    """0 to count - 1, each moved back at random, such that n are given when at most n + window have been read.

    Number i is given by the rank of i + draw, draws being whole numbers below `window`: all numbers up to r - window
    come before any whose i + draw is r, so none waits for more than `window` others.
    """
    draws = ((bits.random_raw(count) >> np.uint64(11)) * 2.0**-53 * window).astype(np.int64)
    draws += np.arange(count)
    return np.argsort(draws, kind="stable")


@dataclass(frozen=True)
class Resumed:
    """What a run that begins inside an epoch reads a second time: places that had been given before, and their tars."""

    places: int
    tars: int


def read_again(plan: EpochPlan, tars: TarOrder, step: int) -> Resumed:
    """What all ranks together read again if the epoch begins with `step`; a lane begins at its first place to give."""
    assert plan.reading_LM is not None
    share = plan.places_SP.shape[1] // len(plan.reading_LM)
    place_of_row = None if tars.order is None else np.argsort(tars.order)
    again: list[Int64] = []
    for lane, reading_M in enumerate(plan.reading_LM):
        given = plan.places_SP[:step, lane * share : (lane + 1) * share].reshape(-1)
        is_given = np.isin(reading_M, given)
        first = int(np.argmin(is_given)) if not is_given.all() else len(is_given)
        again.append(reading_M[first:][is_given[first:]])
    places = np.concatenate(again)
    rows = places if place_of_row is None else place_of_row[places]
    return Resumed(len(places), len(np.unique(np.searchsorted(tars.starts, rows, side="right"))))
