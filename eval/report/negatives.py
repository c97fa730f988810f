"""The hardest negatives of a training's queue as a picture: how alike, how old, and what they look like."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading
from eval.report.figures import BLUE, GREY, ORANGE, TEXT, named_axis, new_figure, save_figure

WHOLE = ("step", "order", "place", "view", "negative_place", "negative_view", "age")
FLOATS = ("cosine", "weight")
BARS = 24  # most of a histogram
MOST = 2**62  # of a number in the table
LATE = 0.75  # of the logged steps: pairs that are drawn are of the rest

Photograph = Callable[[int, int], NDArray[np.uint8] | None]
"""A place and one of its views (-1: any) as uint8 [H, W, 3]; None if it is not to be had."""


@dataclass(frozen=True)
class Negatives:
    """A `negatives.csv`: n rows, each the hardest negative of a place of a batch, by step, hardest first."""

    whole_n: dict[str, NDArray[np.int64]]  # by the names of WHOLE
    cosine_n: NDArray[np.float64]
    weight_n: NDArray[np.float64]

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps that have rows, rising."""
        return np.unique(self.whole_n["step"])


def read_negatives(path: Path) -> Negatives:
    """The table; of a step that was done twice, its last rows. Lines that are cut off or damaged are passed over.

    Raises ValueError naming the file if no row is left.
    """
    by_step: dict[int, list[tuple[list[int], list[float]]]] = {}
    with reading(path, "a table of negatives"), path.open(newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                whole = [int(row[name]) for name in WHOLE]
                floats = [float(row[name]) for name in FLOATS]
            except (KeyError, TypeError, ValueError):
                continue
            if max(map(abs, whole)) >= MOST or whole[6] < 0 or not np.isfinite(floats).all():
                continue
            if whole[1] == 1:
                by_step[whole[0]] = []
            by_step.setdefault(whole[0], []).append((whole, floats))
    rows = [row for _, rows in sorted(by_step.items()) for row in rows]
    if not rows:
        raise ValueError(f"{path}: holds no negatives; its queue was not in use at a step that was logged")
    whole_nW, floats_nF = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    return Negatives(dict(zip(WHOLE, whole_nW.T, strict=True)), floats_nF[:, 0], floats_nF[:, 1])


def hardest_pairs(table: Negatives, most: int) -> list[int]:
    """Rows of different pairs of places, the most similar first, of the last quarter of the steps."""
    steps = table.steps
    late = table.whole_n["step"] >= steps[int(LATE * len(steps))]
    pairs, found = set[frozenset[int]](), list[int]()
    for row in np.argsort(-table.cosine_n, kind="stable").tolist():
        pair = frozenset((int(table.whole_n["place"][row]), int(table.whole_n["negative_place"][row])))
        if late[row] and pair not in pairs and len(found) < most:
            pairs.add(pair)
            found.append(row)
    return found


def draw_negatives(path: Path, table: Negatives, photograph: Photograph, *, most: int, title: str) -> int:
    """Draws the figures and, beneath, `most` pairs of photographs; returns the number of pairs drawn."""
    shown = []
    for row in hardest_pairs(table, most):
        whole = {name: int(values[row]) for name, values in table.whole_n.items()}
        anchor = photograph(whole["place"], whole["view"])
        negative = photograph(whole["negative_place"], whole["negative_view"])
        if anchor is not None and negative is not None:
            shown.append((row, whole, anchor, negative))
    across = 2  # pairs beside each other
    down = -(-len(shown) // across)
    figure = new_figure(13, 4.4 + 2.5 * down)
    figure.suptitle(title, fontsize=TEXT + 2)
    parts = figure.subfigures(2, 1, height_ratios=[4.2, 2.5 * down]) if down else [figure]
    _draw_figures(parts[0].subplots(1, 3), table)
    if down:
        axes = parts[1].subplots(down, 2 * across, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for number, (row, whole, anchor, negative) in enumerate(shown):
            left, right = axes[number // across, 2 * (number % across) :][:2]
            left.imshow(anchor)
            left.set_title(f"anchor: place {whole['place']}\nstep {whole['step']}", fontsize=TEXT - 1)
            right.imshow(negative)
            old = "1 step old" if whole["age"] == 1 else f"{whole['age']} steps old"
            said = f"cosine {table.cosine_n[row]:.2f}, {old}"
            unknown = ", any view" if whole["negative_view"] < 0 else ""
            right.set_title(f"negative: place {whole['negative_place']}{unknown}\n{said}", fontsize=TEXT - 1)
    save_figure(figure, path)
    return len(shown)


def _draw_figures(axes: Any, table: Negatives) -> None:
    step_n, age_n, cosine_n = table.whole_n["step"], table.whole_n["age"], table.cosine_n
    steps = table.steps
    spread = np.array([np.percentile(cosine_n[step_n == step], (10, 50, 90)) for step in steps])
    axis = named_axis(axes[0], title="How alike are they?", x="step", y="cosine with the anchor")
    axis.fill_between(steps, spread[:, 0], spread[:, 2], color=BLUE, alpha=0.25, label="10 to 90 %")
    axis.plot(steps, spread[:, 1], color=BLUE, marker="o", markersize=3, label="median")
    axis.legend(fontsize=TEXT - 1)
    oldest = int(age_n.max())
    width = max(1, -(-(oldest + 1) // BARS))
    edges = np.arange(0, oldest + width + 1, width) - 0.5
    axis = named_axis(axes[1], title="How old are they?", x="age in optimizer steps", y="negatives, %")
    share = np.full(len(age_n), 100 / len(age_n))
    axis.hist(age_n, bins=edges, weights=share, color=BLUE, edgecolor="white")
    axis.axvline(float(np.median(age_n)), color=ORANGE, linestyle="--", label=f"median {np.median(age_n):.0f}")
    axis.legend(fontsize=TEXT - 1)
    axis = named_axis(axes[2], title="Are older ones harder?", x="age in optimizer steps", y="cosine, weight")
    axis.plot(age_n, cosine_n, ".", color=GREY, alpha=0.35, markersize=4, label="cosine of each")
    middle = (edges[:-1] + edges[1:]) / 2
    bin_n = np.clip(np.digitize(age_n, edges) - 1, 0, len(middle) - 1)
    held = [number for number in range(len(middle)) if (bin_n == number).any()]
    means, weights = (
        [float(values[bin_n == number].mean()) for number in held] for values in (cosine_n, table.weight_n)
    )
    axis.plot(middle[held], means, color=BLUE, marker="o", markersize=4, label="cosine, mean")
    axis.plot(middle[held], weights, color=ORANGE, linestyle="--", marker="s", markersize=4, label="weight in the loss")
    axis.legend(fontsize=TEXT - 1)
