"""A training's metrics as charts of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from eval.report.charts import line_chart
from eval.report.drift import PREFIX as DRIFT
from eval.report.training_metrics import metrics_of_steps

_RECALL = re.compile(r"eval/(?:(?P<name>.+)/)?(?P<stage>reranked_)?recall_(?P<k>\d+)")

CHARTS: dict[str, tuple[str, dict[str, str]]] = {
    "Loss": ("loss", {"train/loss": ""}),
    "Hardest pairs": (
        "cosine",
        {"train/hardest_negative": "hardest negative", "train/hardest_positive": "hardest positive"},
    ),
    "Negatives from memory": ("share of the mined ones", {"memory/negatives_from_memory": ""}),
    "Memory queue": (
        "descriptors",
        {"memory/queue_fill": "held", "memory/queue_effective_size": "effective, by their age weights"},
    ),
    "Learning rate": ("rate", {"train/lr": ""}),
    "Speed": ("images/s", {"train/images_per_s": ""}),
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
    recalls = {name: (steps[key], values[key]) for key, name in _recall_lines(list(steps)).items()}
    charts.append(line_chart(recalls, title="Recall by validation", x="step", y="recall in %", y_range=(0, 100)))
    if drift:
        ages = sorted(drift)
        curve: dict[str, tuple[Sequence[float], Sequence[float]]] = {"": (ages, [drift[a] for a in ages])}
        charts.append(line_chart(curve, title="Drift of the queue", x="age in steps", y="cosine with a new encoding"))
    return [chart for chart in charts if chart]


def _recall_lines(keys: Sequence[str]) -> dict[str, str]:
    """The metrics that are lines of recall, and what each is called.

    One benchmark has a line for each K. Of several, their means are shown and each one's smallest K.
    """
    found = {key: match for key in keys if (match := _RECALL.fullmatch(key))}
    benchmarks = {match["name"] for match in found.values() if match["name"]}
    several = len(benchmarks) > 1
    smallest = min((int(match["k"]) for match in found.values()), default=0)
    lines = {}
    for key, match in found.items():
        if (several and int(match["k"]) > smallest) or (not several and benchmarks and not match["name"]):
            continue
        of = f"{match['name'] or 'mean'}, " if several else ""
        lines[key] = f"{of}R@{match['k']} {'re-ranked' if match['stage'] else 'retrieved'}"
    return lines
