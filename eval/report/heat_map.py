"""The picture of a sweep over thresholds."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from eval.report.figures import AROUND, BLACK, TEXT, new_figure, save_figure
from eval.sweep import SweptRecall

LINE = 100  # characters
DARK = 0.35  # share of the colours from either end on which text is white


def draw_heat_map(path: Path, swept: SweptRecall) -> None:
    """Recall over both thresholds as a picture: white is the first stage's recall, orange below it, purple above."""
    recall_SM = np.array(swept.recall, dtype=np.float64)
    figure = new_figure(2.2 + 0.85 * len(swept.match), 2.6 + 0.5 * len(swept.saliency))
    axis = figure.subplots()
    reach = max(1.0, float(np.abs(recall_SM - swept.retrieved).max()))
    low, high = swept.retrieved - reach, swept.retrieved + reach
    shown = axis.imshow(recall_SM, cmap=AROUND, vmin=low, vmax=high, aspect="auto")
    for s, row in enumerate(recall_SM):
        for m, value in enumerate(row):
            share = (value - low) / (high - low)
            colour = "white" if min(share, 1 - share) < DARK / 2 else BLACK
            weight = "bold" if value == recall_SM.max() else "normal"
            axis.text(m, s, f"{value:.1f}", ha="center", va="center", fontsize=TEXT, color=colour, fontweight=weight)
    axis.set_xticks(range(len(swept.match)), [f"{m:g}" for m in swept.match], fontsize=TEXT)
    axis.set_yticks(range(len(swept.saliency)), [f"{s:g}" for s in swept.saliency], fontsize=TEXT)
    axis.set_xlabel("least cosine of a match (nn_match_thresh)", fontsize=TEXT)
    axis.set_ylabel("least saliency of a patch (saliency_thresh)", fontsize=TEXT)
    said = "bold: the highest" + (", frame: the settings' own thresholds" if _frame_own(axis, swept) else "")
    title = f"{swept.benchmark}: R@{swept.k} re-ranked, retrieved {swept.retrieved:.1f} ({said})"
    axis.set_title("\n".join([title, *textwrap.wrap(swept.rule, LINE)]), fontsize=TEXT - 1)
    bar = figure.colorbar(shown)
    bar.set_label(f"recall in %; white is retrieval's {swept.retrieved:.1f}", fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    bar.ax.set_ylim(max(low, 0.0), min(high, 100.0))
    save_figure(figure, path)


def _frame_own(axis: Any, swept: SweptRecall) -> bool:
    """Frames the cell of the settings' own thresholds, if they are on the grid."""
    saliency, match = swept.own
    if saliency not in swept.saliency or match not in swept.match:
        return False
    from matplotlib.patches import Rectangle

    corner = swept.match.index(match) - 0.5, swept.saliency.index(saliency) - 0.5
    for colour, width in ((BLACK, 4.5), ("white", 1.8)):  # is seen on dark and on light
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False))
    return True
