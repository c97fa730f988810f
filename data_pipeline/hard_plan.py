"""Epochs with hard steps: some batches are of places that are alike, the others are composed as ever.

Which places are alike is found while training runs (`trainer/hard_places.py`), a window of steps at a time. All else
is here, as pure functions: which steps are hard, which places may be in them, what the other steps are made of, and
which views are drawn. So the places of the steps composed so far are all that a checkpoint has to store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import DataConfig
from data_pipeline.plan import DrawnViews, EpochPlan, Int64, random_order

LEAST_STEPS = 4  # of an epoch; fewer leave no choice of what is alike
_ORDER, _CHOICE, _VIEWS = (2**21 + number for number in range(3))  # streams of draws, beside those of a mixture's sets

Rest = Callable[[int, Int64], EpochPlan]  # of an epoch number and visits [n]: what else is composed of them


@dataclass(frozen=True)
class Composed:
    """The steps of an epoch that are composed so far: places [s, P], and whether each step is hard [s]."""

    epoch: int
    places_SP: Int64
    is_hard_S: NDArray[np.bool_]

    @property
    def num_steps(self) -> int:
        """s, steps composed so far."""
        return len(self.places_SP)


def nothing_composed(epoch: int, places_per_batch: int) -> Composed:
    """An epoch before its first step."""
    return Composed(epoch, np.zeros((0, places_per_batch), np.int64), np.zeros(0, np.bool_))


def hard_faults(data: DataConfig, num_places: int, num_steps: int, weights: list[float]) -> list[str]:
    """Why `num_places` trained places, of sets with these weights, cannot have hard steps as asked; a line each."""
    if not data.hard_share:
        return []
    faults = []
    if data.composition not in ("city", "mixed"):
        faults.append(f"data.hard_share needs data.composition city or mixed, not {data.composition}; or set it to 0")
    if data.repeat or any(weight > 1 for weight in weights):
        faults.append(
            "data.hard_share needs each place at most once per epoch; leave out data.repeat and weights above 1 in "
            "data.mix, or set it to 0"
        )
    if num_steps < LEAST_STEPS:
        least = num_places // LEAST_STEPS
        what = f"use at most {least}, or " if least > 1 else ""
        faults.append(
            f"data.hard_share chooses places that are alike among {num_places}, only {num_steps} batches of "
            f"data.places_per_batch {data.places_per_batch}; at least {LEAST_STEPS} are needed: {what}set "
            "data.hard_share to 0"
        )
    elif not num_hard(data.hard_share, 0, num_steps):
        faults.append(
            f"data.hard_share {data.hard_share:g} of {num_steps} steps is none; use at least {1 / num_steps:.2g}"
        )
    if 2 * data.hard_cliques > data.places_per_batch:
        faults.append(
            f"data.hard_cliques {data.hard_cliques} need 2 places each, data.places_per_batch is "
            f"{data.places_per_batch}; use at most {max(1, data.places_per_batch // 2)}"
        )
    return faults


def num_hard(share: float, start: int, stop: int) -> int:
    """Hard steps among those of an epoch from `start` to `stop`; windows add up to the share of the epoch."""
    return round(share * stop) - round(share * start)


def window_of(step: int, every: int, num_steps: int) -> tuple[int, int]:
    """Start and stop of the window that a step of an epoch is in; `every` 0 is the whole epoch."""
    if not every:
        return 0, num_steps
    start = step // every * every
    return start, min(start + every, num_steps)


def candidates(
    data: DataConfig, num_views: Int64, visits: Int64, composed: Composed, stop: int, *, seed: int
) -> tuple[Int64, Int64]:
    """Places [N], ascending, that hard steps up to `stop` are chosen from, and the view of each to encode [N].

    `visits` (0 or 1) are the epoch's. The places are drawn from those that no step has yet, `hard_pool` for each place
    of a hard step, all if they are fewer; none if no step is hard.
    """
    start = composed.num_steps
    left = np.flatnonzero(_left(visits, composed))
    wanted = num_hard(data.hard_share, start, stop) * data.places_per_batch
    bits = _bits(seed, composed.epoch, _CHOICE, start)
    chosen = np.sort(left[random_order(len(left), bits)[: round(data.hard_pool * wanted)]])
    if len(chosen) < data.places_per_batch:
        chosen = chosen[:0]
    return chosen, DrawnViews(chosen[:, None], num_views, 1, bits)(slice(None))[:, 0, 0]


def extended(visits: Int64, composed: Composed, stop: int, hard_HP: Int64, rest: Rest, *, seed: int) -> Composed:
    """`composed` up to step `stop` of the epoch: the hard batches given, the others by `rest`, in an order drawn.

    `rest` composes batches of the places that are left, of which as many are taken as are wanting. So each place comes
    as often as in an epoch without hard steps, which leaves as many out at its end.
    """
    start = composed.num_steps
    places_SP, wanted = hard_HP, stop - start - len(hard_HP)
    if wanted:
        left = _left(visits, composed)
        left[hard_HP] -= 1
        places_SP = np.concatenate([hard_HP, rest(composed.epoch, left).places_SP[:wanted]])
    order = random_order(stop - start, _bits(seed, composed.epoch, _ORDER, start))
    is_hard_S = np.arange(stop - start) < len(hard_HP)
    return Composed(
        composed.epoch,
        np.concatenate([composed.places_SP, places_SP[order]]),
        np.concatenate([composed.is_hard_S, is_hard_S[order]]),
    )


def with_views(data: DataConfig, num_views: Int64, composed: Composed, *, seed: int) -> EpochPlan:
    """The plan of the steps composed so far; the K views of a place depend on (seed, epoch) and its position alone."""
    bits = _bits(seed, composed.epoch, _VIEWS, 0)
    return EpochPlan(composed.places_SP, DrawnViews(composed.places_SP, num_views, data.images_per_place, bits))


def _left(visits: Int64, composed: Composed) -> Int64:
    """Times that each place is still to come in the epoch [n]."""
    left = visits.copy()
    left[composed.places_SP] -= 1  # a place comes once: no index is there twice
    return left


def _bits(seed: int, epoch: int, stream: int, start: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, epoch], spawn_key=(stream, start)))
