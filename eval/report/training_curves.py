"""A training's metrics as charts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.report.charts import line_chart
from eval.report.drift import PREFIX as DRIFT
from eval.report.training_metrics import metrics_of_steps

CHARTS: dict[str, tuple[str, dict[str, str]]] = {
    "Loss": ("loss", {"train/loss": "loss"}),
    "Hardest pairs": (
        "cosine",
        {"train/hardest_negative": "hardest negative", "train/hardest_positive": "hardest positive"},
    ),
    "Negatives from memory": ("share", {"memory/negatives_from_memory": "of the mined negatives"}),
    "Memory queue": (
        "descriptors",
        {"memory/queue_fill": "held", "memory/queue_effective_size": "effective, by their age weights"},
    ),
    "Learning rate": ("rate", {"train/lr": "learning rate"}),
    "Speed": ("images/s", {"train/images_per_s": "images per second"}),
}


def training_curves(metrics: Path) -> list[str]:
    """Charts of a `metrics.jsonl`: loss, pairs, queue and its drift, rate, speed, recall by validation.

    A file that is absent has none.
    """
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    drift: dict[int, float] = {}
    for content in metrics_of_steps(metrics) if metrics.is_file() else ():
        for key, value in content.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                steps.setdefault(key, []).append(content["step"])
                values.setdefault(key, []).append(float(value))
                if key.startswith(DRIFT) and key.removeprefix(DRIFT).isdecimal():
                    drift[int(key.removeprefix(DRIFT))] = float(value)
    charts = []
    for title, (unit, names) in CHARTS.items():
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            name: (steps[key], values[key]) for key, name in names.items() if key in steps
        }
        charts.append(line_chart(lines, title=title, x="step", y=unit))
    recalls: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        key: (steps[key], values[key]) for key in steps if "recall_" in key
    }
    charts.append(line_chart(recalls, title="Recall by validation", x="step", y="recall in %", y_range=(0, 100)))
    if drift:
        ages = sorted(drift)
        curve: dict[str, tuple[Sequence[float], Sequence[float]]] = {"last measured": (ages, [drift[a] for a in ages])}
        charts.append(line_chart(curve, title="Drift of the queue", x="age in steps", y="cosine with a new encoding"))
    return [chart for chart in charts if chart]
