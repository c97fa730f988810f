"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from configs.schema import OptimConfig


def learning_rate(step: int, *, total_steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule.

    cosine and linear reach `min_lr_ratio` over the steps that remain after warm-up; the others count epochs or steps,
    as `schedule_unit` says, from the start of training, and are torch.optim.lr_scheduler's of the same names.
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
    return optim.lr * factor


def _cosine(done: float, lowest: float) -> float:
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))
