"""The metrics of a step, as metrics.jsonl and MLflow get them: of the queue under `memory/`, others under `train/`."""

from __future__ import annotations

import torch

from configs.schema import Recipe
from trainer.flops import device_peak_tflops, model_flops
from trainer.state import Progress
from trainer.step import StepOutcome

OF_MEMORY = (
    *("queue_fill", "queue_effective_size", "decay_half_life"),
    *("negatives_from_memory", "mined_negative_age", "drift_age_"),
)


def group_of(figure: str) -> str:
    """`memory` or `train`, the group of metrics that a step's figure is in."""
    return "memory" if figure.startswith(OF_MEMORY) else "train"


class StepMetrics:
    """A step's figures; what is added to the result here is logged."""

    def __init__(self, recipe: Recipe, *, images_per_rank: int) -> None:
        peak = device_peak_tflops(recipe)
        self.seconds_at_peak = images_per_rank * model_flops(recipe) / (peak * 1e12) if peak else None

    def of(
        self, outcome: StepOutcome, progress: Progress, *, epoch: int, lr: float, seconds: float, waited_s: float
    ) -> dict[str, float]:
        """Values by name. `seconds` is the whole step, `waited_s` its part that went by before the data was there."""
        figures = {f"{group_of(name)}/{name}": value for name, value in outcome.figures.items()}
        metrics = {"train/loss": outcome.loss} | figures
        if outcome.grad_norm is not None:
            metrics["train/grad_norm"] = outcome.grad_norm
        metrics |= {
            "train/epoch": float(epoch),
            "train/lr": lr,
            "train/images_per_s": outcome.num_images / seconds,
            "train/data_wait_s": waited_s,
            "train/step_s": seconds,
            "train/skipped_steps": float(progress.skipped_steps),
            "train/bad_images": float(progress.bad_images),
        }
        if self.seconds_at_peak:
            metrics["train/mfu"] = self.seconds_at_peak / seconds  # share of the device's peak
        if torch.cuda.is_initialized():
            metrics["train/gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics
