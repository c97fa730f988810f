"""The epoch plan: which places and which views every global step sees, as a pure function of (index, seed, epoch)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.files import replacing

Int64 = NDArray[np.int64]
MOST_HELD_OUT = 1_000
_AT_ONCE = 2**15
_DRAWN_AT_ONCE = 4  # 64-bit numbers that Philox makes of one count
_HELD_OUT = 2**20 + 1  # a stream of draws, beside those of a mixture's sets


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of S global steps: P places each, K views of each place.

    `views_of` gives the views of a slice of steps, int64 [steps, P, K]; the `__getitem__` of an array of all does too.
    Of tars that are read whole, lane l gives the l-th part of each batch, and reads row l of `reading_LM` in its order.
    """

    places_SP: Int64
    views_of: Callable[[slice], Int64]
    reading_LM: Int64 | None = None

    @property
    def views_SPK(self) -> Int64:
        """The views of all steps, which take K times the memory of the places."""
        return self.views_of(slice(0, self.num_steps))

    @property
    def num_steps(self) -> int:
        """S, global steps in the epoch."""
        return len(self.places_SP)

    def write(self, path: Path) -> None:
        """Write the plan as Parquet, a row for each place of each step: step, slot, place_id, views (list)."""
        views_SPK = self.views_SPK
        steps, places, k = views_SPK.shape
        views = pa.FixedSizeListArray.from_arrays(pa.array(views_SPK.reshape(-1)), k)
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
        part = self.rank_part(rank, world_size)
        return self.places_SP[step, part], self.views_of(slice(step, step + 1))[0, part]

    def rank_part(self, rank: int, world_size: int) -> slice:
        """Which of a step's places a rank takes."""
        share = self.places_SP.shape[1] // world_size
        return slice(rank * share, (rank + 1) * share)


@dataclass(frozen=True)
class Batching:
    """What a batch is made of: P places with K images of each, of one city ("city") or of all ("mixed").

    The places of a city whose number is in `repeat` come that many times an epoch.
    """

    places_per_batch: int
    images_per_place: int
    composition: str
    repeat: Mapping[int, int] = field(default_factory=dict)


def batch_faults(num_views: Int64, visits: Int64 | None, batching: Batching) -> list[str]:
    """Why places with so many views, seen so often (int64 [n]; None is once), make no such batches; a line each."""
    faults = []
    num_seen = len(num_views) if visits is None else int(np.count_nonzero(visits))
    k = batching.images_per_place
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
    place_city: Int64,
    num_views: Int64,
    batching: Batching,
    *,
    seed: int,
    epoch: int,
    visits: Int64 | None = None,
    of_set: int | None = None,
) -> EpochPlan:
    """The plan of one epoch over places 0..n-1, given each place's city number and number of views (int64 [n]).

    Composition "mixed" draws a batch from all cities; "city" fills batches from one city each, and only what is left
    over of the cities is mixed. Each place comes once per epoch (`visits` times, int64 [n], if given; times
    `repeat[city]` for the cities named there), K of its views without replacement; the last incomplete batch is
    dropped, another one each epoch. `of_set` tells plans of one seed and epoch apart. Nothing about ranks, workers or
    resume enters, and only raw 64-bit draws do, whose stream numpy guarantees over versions. Holds 8 bytes for each
    place, while it is made 16; views are drawn when they are asked for.
    Raises ValueError where there are fewer places than a batch takes or a place has fewer than K views.
    """
    places_per_batch = batching.places_per_batch
    if faults := batch_faults(num_views, visits, batching):
        raise ValueError("\n".join(faults))
    key = () if of_set is None else (of_set,)
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch], spawn_key=key))
    if batching.composition == "mixed":
        stream = _rounds(range(len(num_views)), visits, places_per_batch, bits)
    else:
        stream = _city_stream(place_city, batching, visits, bits)
    num_steps = len(stream) // places_per_batch
    places_SP = stream[: num_steps * places_per_batch].reshape(num_steps, places_per_batch)
    places_SP = places_SP[random_order(num_steps, bits)]
    return EpochPlan(places_SP, DrawnViews(places_SP, num_views, batching.images_per_place, bits))


def _shuffled(items: Int64, bits: np.random.Philox) -> Int64:
    """The items in the order of a random draw each."""
    return items[random_order(len(items), bits)]


def random_order(count: int, bits: np.random.Philox) -> Int64:
    """0 to count - 1 in the order of a random draw each, whose low bits are the number: no two are equal."""
    number_bits = np.uint64((1 << count.bit_length()) - 1)
    draws = bits.random_raw(count)
    for start in range(0, count, _AT_ONCE):
        part = draws[start : start + _AT_ONCE]
        part &= ~number_bits
        part |= np.arange(start, start + len(part), dtype=np.uint64)
    draws.sort()
    draws &= number_bits
    return draws.view(np.int64)


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


def _rounds(places: Int64 | range, visits: Int64 | None, batch: int, bits: np.random.Philox) -> Int64:
    """Each place `visits` times, shuffled in rounds so that no batch of the stream holds a place twice."""
    if visits is None:
        order = random_order(len(places), bits)
        if isinstance(places, range):
            order += places.start
            return order
        return places[order]
    if isinstance(places, range):
        places = np.arange(places.start, places.stop, dtype=np.int64)
    stream = places[:0]
    # The smallest round comes first: a later one then always has enough other places for the batch that is open.
    for number in range(int(visits.max(initial=0)) - 1, -1, -1):
        fresh = _shuffled(places[visits > number], bits)
        if not len(stream):
            stream = fresh
            continue
        if len(fresh) < batch:
            raise ValueError(
                f"{len(fresh)} places are to be seen {number + 1} times, fewer than data.places_per_batch {batch}; "
                "lower their weight in data.mix"
            )
        # Places of the batch that is still open go to the end of the round.
        again = np.isin(fresh, stream[len(stream) // batch * batch :])
        stream = np.concatenate([stream, fresh[~again], fresh[again]])
    return stream


def _city_stream(place_city: Int64, batching: Batching, visits: Int64 | None, bits: np.random.Philox) -> Int64:
    """All places so that whole batches come first, each of one city, then the cities' left-overs."""
    batch, members = batching.places_per_batch, _places_by_city(place_city)
    visits_of = {city: _visits_of(members[city], visits, batching.repeat.get(city, 1)) for city in members}
    total = sum(len(members[city]) if seen is None else int(seen.sum()) for city, seen in visits_of.items())
    stream, filled, rest = np.empty(total, dtype=np.int64), 0, []
    for city in _shuffled(np.array(list(members), dtype=np.int64), bits).tolist():
        seen = visits_of[city]
        num_seen = len(members[city]) if seen is None else int(np.count_nonzero(seen))
        if batching.repeat.get(city, 1) > 1 and num_seen < batch:
            raise ValueError(
                f"data.repeat: city number {city} has {num_seen} places, fewer than "
                f"data.places_per_batch {batch}; only larger cities can be repeated"
            )
        of_city = _rounds(members[city], seen, batch, bits)
        cut = len(of_city) // batch * batch
        stream[filled : filled + cut] = of_city[:cut]
        filled += cut
        rest.append(of_city[cut:].copy())
    stream[filled:] = np.concatenate(rest)
    return stream


def _visits_of(places: Int64 | range, visits: Int64 | None, rounds: int) -> Int64 | None:
    """Times that an epoch sees each of some places; None where each comes once."""
    if visits is None:
        return None if rounds == 1 else np.full(len(places), rounds, dtype=np.int64)
    return visits[slice(places.start, places.stop) if isinstance(places, range) else places] * rounds


def _places_by_city(place_city: Int64) -> dict[int, Int64 | range]:
    """The places of each city, cities ascending; a range where the places of all lie together, as in a shard set."""
    edges, in_order = [0], True
    for start in range(0, len(place_city), _AT_ONCE):
        part = place_city[max(0, start - 1) : start + _AT_ONCE]
        step = np.diff(part)
        in_order &= not (step < 0).any()
        edges += (np.flatnonzero(step) + max(0, start - 1) + 1).tolist() if in_order else []
    if in_order:
        edges.append(len(place_city))
        return {int(place_city[start]): range(start, stop) for start, stop in itertools.pairwise(edges)}
    by_city = np.argsort(place_city, kind="stable")
    ordered = place_city[by_city]
    starts = np.append(0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    return dict(zip(ordered[starts].tolist(), np.split(by_city, starts[1:]), strict=True))


class DrawnViews:
    """K distinct views of each place of a plan, every K-subset as likely (Floyd's sampling), drawn when asked for.

    Which views a place has depends on its position in the plan alone: each view takes one raw draw of a generator that
    can be set to any position.
    """

    def __init__(self, places_SP: Int64, num_views: Int64, k: int, bits: np.random.Philox) -> None:
        self.places_SP, self.num_views, self.k = places_SP, num_views, k
        self._state = bits.state

    def __call__(self, steps: slice) -> Int64:
        """The views of some steps, int64 [steps, P, K]."""
        first, stop, _ = steps.indices(len(self.places_SP))
        places_N = self.places_SP[first:stop].reshape(-1)
        at, views_NK = first * self.places_SP.shape[1], np.empty((places_N.size, self.k), dtype=np.int64)
        for start in range(0, len(places_N), _AT_ONCE):  # what is worked on stays in the processor's cache
            part = slice(start, start + _AT_ONCE)
            num_views_N = self.num_views[places_N[part]]
            raw = _raw_draws(self._state, (at + start) * self.k, num_views_N.size * self.k)
            views_NK[part] = _floyd(num_views_N, raw.reshape(-1, self.k)).T
        return views_NK.reshape(-1, self.places_SP.shape[1], self.k)


def _raw_draws(state: Any, start: int, count: int) -> NDArray[np.uint64]:
    """The raw draws `start` to `start + count` of a Philox generator from a state; it makes four at a time."""
    bits = np.random.Philox(0)
    buffered = _DRAWN_AT_ONCE - state["buffer_pos"]
    if start < buffered:
        bits.state = state
        return bits.random_raw(start + count)[start:]
    bits.state = state | {"buffer_pos": _DRAWN_AT_ONCE}
    blocks, skipped = divmod(start - buffered, _DRAWN_AT_ONCE)
    bits.advance(blocks)
    return bits.random_raw(skipped + count)[skipped:]


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
