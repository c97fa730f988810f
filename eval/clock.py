"""Time that an evaluation takes, on the slowest rank."""

from __future__ import annotations

import time

import torch

from configs.ranks import barrier


class Clock:
    """Wall time between points that all ranks have reached with their device idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        barrier()
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, of the slowest rank; every rank must call this."""
        now = self._now()
        seconds, self._last = now - self._last, now
        return seconds
