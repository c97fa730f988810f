"""The epoch plan in its plainest form, everything in memory at once: what the plan in blocks is held against."""

from __future__ import annotations

import numpy as np

from data_pipeline.plan import Batching, Int64


def plain_plan(
    place_city: Int64, num_views: Int64, batching: Batching, *, seed: int, epoch: int, visits: Int64 | None = None
) -> tuple[Int64, Int64]:
    """Places [S, P] and views [S, P, K]."""
    batch, k = batching.places_per_batch, batching.images_per_place
    visits = np.ones(len(num_views), dtype=np.int64) if visits is None else visits
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    if batching.composition == "mixed":
        stream = _rounds(np.arange(len(num_views), dtype=np.int64), visits, batch, bits)
    else:
        cities = np.unique(place_city)
        whole, rest = [], []
        for city in _shuffled(cities, bits).tolist():
            members = np.flatnonzero(place_city == city)
            of_city = _rounds(members, visits[members] * batching.repeat.get(city, 1), batch, bits)
            cut = len(of_city) // batch * batch
            whole.append(of_city[:cut])
            rest.append(of_city[cut:])
        stream = np.concatenate(whole + rest)
    steps = len(stream) // batch
    places_SP = stream[: steps * batch].reshape(steps, batch)
    places_SP = places_SP[_shuffled(np.arange(steps), bits)]
    raw_NK = bits.random_raw(places_SP.size * k).reshape(-1, k)
    views = [_floyd(int(num_views[place]), raw) for place, raw in zip(places_SP.reshape(-1), raw_NK, strict=True)]
    return places_SP, np.array(views, dtype=np.int64).reshape(steps, batch, k)


def _shuffled(items: Int64, bits: np.random.Philox) -> Int64:
    number_bits = (1 << len(items).bit_length()) - 1
    draws = [int(draw) & ~number_bits | number for number, draw in enumerate(bits.random_raw(len(items)))]
    return items[[draw & number_bits for draw in sorted(draws)]]


def _rounds(places: Int64, visits: Int64, batch: int, bits: np.random.Philox) -> Int64:
    stream = places[:0]
    for number in range(int(visits.max(initial=0)) - 1, -1, -1):
        fresh = _shuffled(places[visits > number], bits)
        if len(stream) and len(fresh) < batch:
            raise ValueError("fewer than a batch")
        again = np.isin(fresh, stream[len(stream) // batch * batch :])
        stream = np.concatenate([stream, fresh[~again], fresh[again]])
    return stream


def _floyd(views: int, raw: np.ndarray) -> list[int]:
    drawn: list[int] = []
    for j, bits in enumerate(raw.tolist()):
        last = views - len(raw) + j
        view = int((bits >> 11) * 2.0**-53 * (last + 1))
        drawn.append(last if view in drawn else view)
    return drawn
