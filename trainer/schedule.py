"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from configs.schema import OptimConfig


def learning_rate(step: int, *, total_steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule over the steps that remain."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    span = 1 - optim.min_lr_ratio
    match optim.schedule:
        case "cosine":
            factor = optim.min_lr_ratio + span * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "linear":
            factor = 1 - span * min(1.0, done)
        case "exp":
            factor = optim.exp_gamma ** (step // steps_per_epoch)
        case "none":
            factor = 1.0
    return optim.lr * factor
