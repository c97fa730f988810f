"""Drift of a training's queue by age, beside the weight that its decay gives to that age."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.report.figures import BLACK, IN_ORDER, ORANGE, TEXT, named_axis, new_figure, save_figure
from eval.report.training_metrics import metrics_of_steps

PREFIX = "memory/drift_age_"
LONGEST = 16  # digits of an age
CURVES, AGES = 5, 4  # of all that were measured, evenly spread


@dataclass(frozen=True)
class Drift:
    """By step, the cosine of stored descriptors with those of the same images encoded again, by age in steps."""

    cosine: dict[int, dict[int, float]]

    def ages(self) -> list[int]:
        """All ages that were measured, rising."""
        return sorted({age for curve in self.cosine.values() for age in curve})

    def curve(self, step: int) -> NDArray[np.float64]:
        """(age, cosine) of a step, rising ages [a, 2]."""
        return np.array(sorted(self.cosine[step].items()), dtype=np.float64)


def read_drift(metrics: Path) -> Drift:
    """The drift in a `metrics.jsonl`; damaged lines are passed over. Raises ValueError if nothing was measured."""
    cosine: dict[int, dict[int, float]] = {}
    for content in metrics_of_steps(metrics):
        found = {int(key.removeprefix(PREFIX)): value for key, value in content.items() if _is_drift(key, value)}
        if found:
            cosine[content["step"]] = found
    if not cosine:
        raise ValueError(
            f"{metrics}: holds no drift; train with --memory.drift-every 50, and with a queue (memory.start_epoch)"
        )
    return Drift(cosine)


def _is_drift(key: str, value: object) -> bool:
    age = key.removeprefix(PREFIX)
    is_age = key.startswith(PREFIX) and age.isdecimal() and len(age) < LONGEST
    return is_age and isinstance(value, float | int) and abs(value) < 2  # a cosine, but for rounding


def draw_drift(
    path: Path, drift: Drift, weights_a2: NDArray[np.float64], *, decay: str, half_life: float, title: str
) -> None:
    """Left the cosine by age at some steps with the decay's weights (age, weight); right some ages over the steps."""
    from matplotlib import colormaps

    steps, ages = sorted(drift.cosine), drift.ages()
    figure = new_figure(12, 4.8)
    figure.suptitle(title, fontsize=TEXT + 2)
    left, right = figure.subplots(1, 2)
    named_axis(left, title="By age", x="age in optimizer steps", y="cosine, weight")
    some = _spread(steps, CURVES)
    shades = colormaps[IN_ORDER](np.linspace(0, 0.85, max(2, len(some))))
    for number, (step, shade) in enumerate(zip(some, shades, strict=False)):
        curve_a2 = np.concatenate([[[0.0, 1.0]], drift.curve(step)])
        marker = "osD^v"[number]
        left.plot(
            curve_a2[:, 0], curve_a2[:, 1], color=shade, marker=marker, markersize=4, label=f"cosine, step {step}"
        )
    left.plot(weights_a2[:, 0], weights_a2[:, 1], color=ORANGE, linestyle="--", linewidth=2, label=f"weight: {decay}")
    if np.isfinite(half_life) and half_life <= weights_a2[-1, 0]:
        left.axvline(half_life, color=BLACK, linestyle=":", label=f"half the weight: {half_life:.1f} steps")
    left.set_ylim(min(0.0, *(min(curve.values()) for curve in drift.cosine.values())), 1.05)
    left.legend(fontsize=TEXT - 1)
    named_axis(right, title="By step", x="step", y="cosine of stored and present descriptor")
    some = _spread(ages, AGES)
    shades = colormaps[IN_ORDER](np.linspace(0, 0.85, max(2, len(some))))
    for age, shade, style in zip(some, shades, ("-", "--", "-.", ":"), strict=False):
        points = [(step, drift.cosine[step][age]) for step in steps if age in drift.cosine[step]]
        x, y = zip(*points, strict=True)
        right.plot(x, y, color=shade, linestyle=style, marker="o", markersize=3, label=f"age {age}")
    right.legend(fontsize=TEXT - 1, title="optimizer steps old", title_fontsize=TEXT - 1)
    save_figure(figure, path)


def _spread(values: list[int], most: int) -> list[int]:
    """At most so many of some values, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]
