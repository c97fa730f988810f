"""The learning rate, and when to stop, as pure functions of the step and of the recalls so far."""

from __future__ import annotations

import math
from collections.abc import Iterable

from configs.schema import OptimConfig


def learning_rate(
    step: int, *, total_steps: int, steps_per_epoch: int, optim: OptimConfig, recalls: Iterable[float] = ()
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule.

    cosine and linear reach `min_lr_ratio` over the steps that remain after warm-up; plateau looks at `recalls`, those
    of the validations so far; the others count epochs or steps, as `schedule_unit` says, from the start of training.
    step, multi_step, exp, cosine_with_restarts and plateau are torch.optim.lr_scheduler's.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    units = step // steps_per_epoch if optim.schedule_unit == "epoch" else step
    match optim.schedule:
        case "none":
            factor = 1.0
        case "step":
            factor = optim.gamma ** (units // optim.step_size)
        case "multi_step":
            factor = optim.gamma ** sum(units >= milestone for milestone in optim.milestones)
        case "exp":
            factor = optim.gamma**units
        case "cosine":
            factor = _cosine(done, optim.min_lr_ratio)
        case "cosine_with_restarts":
            factor = _cosine(units % optim.step_size / optim.step_size, optim.min_lr_ratio)
        case "linear":
            factor = 1 - (1 - optim.min_lr_ratio) * done
        case "plateau":
            factor = optim.gamma ** plateau_falls(recalls, optim.plateau_evals)
    return optim.lr * factor


def plateau_falls(recalls: Iterable[float], patience: int) -> int:
    """How often the rate has fallen: each time `patience` validations in a row bring no recall above the best one."""
    best, bad, falls = -math.inf, 0, 0
    for recall in recalls:
        best, bad = (recall, 0) if recall > best else (best, bad + 1)
        if bad == patience:
            falls, bad = falls + 1, 0
    return falls


def validations_since_best(recalls: Iterable[float]) -> int:
    """Validations after the first one that reached the highest recall; 0 where there is none."""
    values = list(recalls)
    return len(values) - 1 - values.index(max(values)) if values else 0


def _cosine(done: float, lowest: float) -> float:
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))
