"""The picture of a sweep over thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.sweep import Sweep


def draw_heat_map(path: Path, recall_SM: NDArray[np.float64], sweep: Sweep, title: str, first_stage: float) -> None:
    """Recall over both thresholds as a picture; the colours are centred on the first stage's recall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    reach = max(1.0, float(np.abs(recall_SM - first_stage).max()))
    shown = axis.imshow(recall_SM, cmap="RdYlGn", vmin=first_stage - reach, vmax=first_stage + reach, aspect="auto")
    for s, row in enumerate(recall_SM):
        for m, value in enumerate(row):
            axis.text(m, s, f"{value:.1f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(sweep.match)), [f"{m:g}" for m in sweep.match])
    axis.set_yticks(range(len(sweep.saliency)), [f"{s:g}" for s in sweep.saliency])
    axis.set_xlabel("nn_match_thresh")
    axis.set_ylabel("saliency_thresh")
    axis.set_title(title, fontsize=9)
    figure.colorbar(shown, label=f"recall in %; yellow is retrieval's {first_stage:.1f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
