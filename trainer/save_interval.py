"""How often to save: a number of seconds, or the interval that loses least at a given rate of failures."""

from __future__ import annotations

import math
import time
from typing import Literal

FIRST_GUESS_S = 0.1  # what a save is taken to cost until one is measured: too little costs one early save


def best_interval(save_s: float, mean_time_between_failures_s: float) -> float:
    """Seconds from one checkpoint to the next at which saves and steps done twice cost least in sum.

    `save_s` is how long a save holds the training. Young's first order, sqrt(2 save_s M) ("A first order approximation
    to the optimum checkpoint interval", CACM 1974), with the higher order of Daly ("A higher order estimate of the
    optimum checkpoint interval for restart dumps", FGCS 2006, equation 37).
    """
    if save_s >= 2 * mean_time_between_failures_s:
        return mean_time_between_failures_s
    ratio = save_s / (2 * mean_time_between_failures_s)
    first_order = math.sqrt(2 * save_s * mean_time_between_failures_s)
    return first_order * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


class SaveClock:
    """Says when the next checkpoint is due by time. Rank 0's is heard by all: clocks of ranks differ."""

    def __init__(self, every_s: float | Literal["auto"], mean_time_between_failures_s: float) -> None:
        """`every_s` 0 is never."""
        self.every_s, self.mean_time_between_failures_s = every_s, mean_time_between_failures_s
        self.held_s: float | None = None  # how long the last save held the training
        self.written_s = 0.0  # how long it took until it was valid
        self._began = time.monotonic()

    @property
    def interval_s(self) -> float:
        """Seconds from one checkpoint to the next; `auto` never asks for one before the last is valid."""
        if self.every_s != "auto":
            return self.every_s
        held_s = FIRST_GUESS_S if self.held_s is None else self.held_s
        return max(best_interval(held_s, self.mean_time_between_failures_s), self.written_s)

    def is_due(self) -> bool:
        """Whether the interval has passed since the last checkpoint was begun, or the process."""
        return self.interval_s > 0 and time.monotonic() - self._began >= self.interval_s

    def saving(self) -> None:
        """A checkpoint is begun, whatever it is begun for."""
        self._began = time.monotonic()

    def saved(self, held_s: float) -> None:
        """That checkpoint is valid, and held the training for `held_s` in all."""
        self.held_s, self.written_s = held_s, time.monotonic() - self._began
