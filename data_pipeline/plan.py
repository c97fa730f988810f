"""The epoch plan: which places and which views every global step sees, as a pure function of (index, seed, epoch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.files import replacing

Int64 = NDArray[np.int64]
MOST_HELD_OUT = 1_000
_AT_ONCE = 2**15
_HELD_OUT = 2**20 + 1  # a stream of draws, beside those of a mixture's sets


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of S global steps: P places each, K views of each place."""

    places_SP: Int64
    views_SPK: Int64

    @property
    def num_steps(self) -> int:
        """S, global steps in the epoch."""
        return len(self.places_SP)

    def write(self, path: Path) -> None:
        """Write the plan as Parquet, a row for each place of each step: step, slot, place_id, views (list)."""
        steps, places, k = self.views_SPK.shape
        views = pa.FixedSizeListArray.from_arrays(pa.array(self.views_SPK.reshape(-1)), k)
        columns = {
            "step": np.repeat(np.arange(steps), places),
            "slot": np.tile(np.arange(places), steps),
            "place_id": self.places_SP.reshape(-1),
            "views": views,
        }
        with replacing(path) as partial:
            pq.write_table(pa.table(columns), partial, compression="zstd")

    def rank_slice(self, step: int, rank: int, world_size: int) -> tuple[Int64, Int64]:
        """Rank's share of a step: places [P/W] and views [P/W, K]; P must be divisible by W."""
        share = self.places_SP.shape[1] // world_size
        part = slice(rank * share, (rank + 1) * share)
        return self.places_SP[step, part], self.views_SPK[step, part]


@dataclass(frozen=True)
class Batching:
    """What a batch is made of: P places with K images of each, of one city ("city") or of all ("mixed").

    The places of a city whose number is in `repeat` come that many times an epoch.
    """

    places_per_batch: int
    images_per_place: int
    composition: str
    repeat: Mapping[int, int] = field(default_factory=dict)


def batch_faults(num_views: Int64, visits: Int64, batching: Batching) -> list[str]:
    """Why places with so many views, seen so often (int64 [n]), cannot be planned in such batches; a line each."""
    faults = []
    num_seen, k = int(np.count_nonzero(visits)), batching.images_per_place
    if num_seen < batching.places_per_batch:
        faults.append(
            f"{num_seen} places are fewer than data.places_per_batch {batching.places_per_batch}; use at most "
            f"{num_seen}"
        )
    if num_views.min() < k:
        place = int(num_views.argmin())
        faults.append(
            f"place {place} has {num_views[place]} views, fewer than data.images_per_place {k}; "
            f"use at most {num_views[place]} or shard with --min-images-per-place {k}"
        )
    if batching.repeat and batching.composition == "mixed":
        faults.append("data.repeat needs data.composition city; --data.repeat alone empties it")
    return faults


def plan_epoch(
    place_city: Int64, num_views: Int64, batching: Batching, *, seed: int, epoch: int, visits: Int64 | None = None
) -> EpochPlan:
    """The plan of one epoch over places 0..n-1, given each place's city number and number of views (int64 [n]).

    Composition "mixed" draws a batch from all cities; "city" fills batches from one city each, and only what is left
    over of the cities is mixed. Each place comes once per epoch (`visits` times, int64 [n], if given; times
    `repeat[city]` for the cities named there), K of its views without replacement; the last incomplete batch is
    dropped, another one each epoch. Nothing about ranks, workers or resume enters, and only raw 64-bit draws do, whose
    stream numpy guarantees over versions.
    Raises ValueError where there are fewer places than a batch takes or a place has fewer than K views.
    """
    places_per_batch, images_per_place = batching.places_per_batch, batching.images_per_place
    if visits is None:
        visits = np.ones(len(num_views), dtype=np.int64)
    if faults := batch_faults(num_views, visits, batching):
        raise ValueError("\n".join(faults))
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    if batching.composition == "mixed":
        stream = _rounds(np.arange(len(num_views), dtype=np.int64), visits, places_per_batch, bits)
    else:
        stream = _city_stream(place_city, batching, visits, bits)
    num_steps = len(stream) // places_per_batch
    places_SP = stream[: num_steps * places_per_batch].reshape(num_steps, places_per_batch)
    places_SP = places_SP[_shuffled(np.arange(num_steps), bits)]
    return EpochPlan(places_SP, _draw_views(num_views[places_SP], images_per_place, bits))


def _shuffled(items: Int64, bits: np.random.Philox) -> Int64:
    """The items in the order of a random draw each, whose low bits are the item's number: no two are equal."""
    number_bits = np.uint64((1 << len(items).bit_length()) - 1)
    draws = bits.random_raw(len(items))
    draws &= ~number_bits
    draws |= np.arange(len(items), dtype=np.uint64)
    draws.sort()
    draws &= number_bits
    return items[draws.view(np.int64)]


def visits_of_epoch(num_places: int, weight: float, *, seed: int, epoch: int, stream: int) -> Int64:
    """Times that an epoch sees each place, int64 [n]: `weight`, rounded up for as many of them as its fraction says.

    Which ones changes from epoch to epoch, until all had their turn; every epoch has as many. `stream` tells the sets
    of a mixture apart. Nothing but the arguments enters.
    """
    visits = np.full(num_places, int(weight), dtype=np.int64)
    more = round((weight - int(weight)) * num_places)
    if more:
        turn, part = divmod(epoch, -(-num_places // more))
        bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream, turn)))
        start = min(part * more, num_places - more)
        visits[_shuffled(np.arange(num_places), bits)[start : start + more]] += 1
    return visits


def held_out_places(num_places: int, share: float, *, seed: int) -> Int64:
    """Places that training leaves out, ascending: `share` of them, at least one if above 0, at most MOST_HELD_OUT.

    Nothing but the arguments enters. Raises ValueError where fewer than 2 would be left to train on.
    """
    if share == 0:
        return np.zeros(0, dtype=np.int64)
    number = min(max(1, round(share * num_places)), MOST_HELD_OUT)
    if num_places - number < 2:
        raise ValueError(
            f"data.held_out {share:g} leaves {num_places - number} of {num_places} places to train on; at least 2 are "
            "needed"
        )
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_HELD_OUT,)))
    return np.sort(_shuffled(np.arange(num_places), bits)[:number])


def _rounds(places: Int64, visits: Int64, batch: int, bits: np.random.Philox) -> Int64:
    """Each place `visits` times, shuffled in rounds so that no batch of the stream holds a place twice."""
    stream = places[:0]
    # The smallest round comes first: a later one then always has enough other places for the batch that is open.
    for number in range(int(visits.max(initial=0)) - 1, -1, -1):
        fresh = _shuffled(places[visits > number], bits)
        if len(stream) and len(fresh) < batch:
            raise ValueError(
                f"{len(fresh)} places are to be seen {number + 1} times, fewer than data.places_per_batch {batch}; "
                "lower their weight in data.mix"
            )
        # Places of the batch that is still open go to the end of the round.
        again = np.isin(fresh, stream[len(stream) // batch * batch :])
        stream = np.concatenate([stream, fresh[~again], fresh[again]])
    return stream


def _city_stream(place_city: Int64, batching: Batching, visits: Int64, bits: np.random.Philox) -> Int64:
    """All places so that whole batches come first, each of one city, then the cities' left-overs."""
    whole, rest, batch = [], [], batching.places_per_batch
    by_city = np.argsort(place_city, kind="stable")
    ordered = place_city[by_city]
    starts = np.append(0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    cities = ordered[starts]
    members = dict(zip(cities.tolist(), np.split(by_city, starts[1:]), strict=True))
    for city in _shuffled(cities, bits).tolist():
        rounds = batching.repeat.get(city, 1)
        seen = int(np.count_nonzero(visits[members[city]]))
        if rounds > 1 and seen < batch:
            raise ValueError(
                f"data.repeat: city number {city} has {seen} places, fewer than "
                f"data.places_per_batch {batch}; only larger cities can be repeated"
            )
        stream = _rounds(members[city], visits[members[city]] * rounds, batch, bits)
        cut = len(stream) // batch * batch
        whole.append(stream[:cut])
        rest.append(stream[cut:])
    return np.concatenate(whole + rest)


def _draw_views(num_views_SP: Int64, k: int, bits: np.random.Philox) -> Int64:
    """K distinct views of each place, every K-subset as likely (Floyd's sampling, vectorised over places)."""
    num_views_N = num_views_SP.reshape(-1)
    views_NK = np.empty((num_views_N.size, k), dtype=np.int64)
    for start in range(0, len(views_NK), _AT_ONCE):  # what is worked on stays in the processor's cache
        part = slice(start, start + _AT_ONCE)
        views_NK[part] = _floyd(num_views_N[part], bits.random_raw(views_NK[part].size).reshape(-1, k)).T
    return views_NK.reshape(*num_views_SP.shape, k)


def _floyd(num_views_N: Int64, raw_NK: NDArray[np.uint64]) -> Int64:
    """Floyd's sampling of K of each place's views, int64 [K, N], from 64 random bits for each view drawn."""
    raw_KN = np.ascontiguousarray(raw_NK.T)
    k = len(raw_KN)
    views_KN = np.empty(raw_KN.shape, dtype=np.int64)
    for j in range(k):
        last = num_views_N - k + j
        # The top 53 bits as a fraction; the product stays below last + 1 for any number of views below 2**52.
        drawn = ((raw_KN[j] >> np.uint64(11)) * 2.0**-53 * (last + 1)).astype(np.int64)
        taken = (views_KN[:j] == drawn).any(axis=0)
        views_KN[j] = np.where(taken, last, drawn)
    return views_KN
