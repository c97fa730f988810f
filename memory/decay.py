"""How much a memory negative of a given age weighs."""

from __future__ import annotations

import math

import torch

from configs.schema import MemoryConfig


def exponential_log_weight(age_n: torch.Tensor, decay_lambda: float) -> torch.Tensor:
    """log exp(-lambda * age), age in optimizer steps."""
    return -decay_lambda * age_n


def measured_log_weight(age_n: torch.Tensor, curve_a2: torch.Tensor) -> torch.Tensor:
    """log c(age)^2, where c is the measured cosine between a descriptor as stored and as the model gives it now.

    `curve_a2` holds (age, cosine) with rising ages. c is 1 at age 0, falls from point to point along straight lines,
    stays at the last value beyond the last age, and never rises (a point above an earlier one is taken down to it).
    c^2 is the share of the stored vector's squared length that still points where the model points. An empty curve,
    before the first measurement, leaves every weight at 1.
    """
    if not len(curve_a2):
        return torch.zeros_like(age_n)
    start = curve_a2.new_zeros(1, 2)
    start[0, 1] = 1
    points = torch.cat([start, curve_a2]).to(age_n)
    ages, cosines = points[:, 0].contiguous(), points[:, 1].clamp(1e-6, 1.0).cummin(0).values
    right = torch.searchsorted(ages, age_n.contiguous()).clamp(1, len(ages) - 1)
    left = right - 1
    share = ((age_n - ages[left]) / (ages[right] - ages[left])).clamp(0, 1)
    return 2 * (cosines[left] + share * (cosines[right] - cosines[left])).log()


def log_weight(age_n: torch.Tensor, memory: MemoryConfig, curve_a2: torch.Tensor) -> torch.Tensor:
    """log of each entry's weight, by the recipe's decay; `age_n` in optimizer steps, floating point."""
    if memory.decay == "measured":
        return measured_log_weight(age_n, curve_a2)
    return exponential_log_weight(age_n, memory.decay_lambda)


def half_life(memory: MemoryConfig, curve_a2: torch.Tensor, longest: int = 1 << 20) -> float:
    """Least age in optimizer steps at which a weight is one half; infinite if it never is (sought up to `longest`)."""
    if memory.decay == "exponential":
        return math.log(2) / memory.decay_lambda if memory.decay_lambda else math.inf
    last = int(curve_a2[-1, 0]) if len(curve_a2) else 0
    ages = torch.arange(min(last, longest) + 1, dtype=torch.float64)
    below = (measured_log_weight(ages, curve_a2.double().cpu()) <= -math.log(2)).nonzero()
    return float(below[0]) if len(below) else math.inf
