"""Draws docs/pictures/town.jpg after `make demo`: night queries that re-ranking rescued, with their matches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import rerankvpr
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.load import load_benchmarks
from eval.describer import Describer, LocalImage
from eval.given_images import pixels_of
from eval.report.match_pictures import dim_others

ROWS = 1
COUNTED, OTHER, RIGHT, WRONG = "#39d6ff", "#c8cdd2", "#0072B2", "#D55E00"


def rescued(m: Describer, town: Benchmark) -> list[tuple[int, int, int]]:
    """Night queries whose first candidate is wrong before re-ranking and right after: query, before, after."""
    similarity_QI = m.describe(town.queries) @ m.describe(town.database).T
    night = [q for q, file in enumerate(town.queries) if "night" in file.name]
    found = []
    for q in night:
        first = np.argsort(-similarity_QI[q], kind="stable")[: m.config.rerank.top_k]
        if first[0] in town.positives(q):
            continue
        query = m.local(town.queries[q])[0]
        kept = m.local([town.database[i] for i in first])
        weight = m.config.rerank.global_weight
        scores = [
            m.match(query, one).score / max(len(query.codes_NC), 1) + weight * similarity_QI[q, i]
            for one, i in zip(kept, first, strict=True)
        ]
        best = int(first[int(np.argmax(scores))])
        if best in town.positives(q):
            found.append((q, int(first[0]), best))
    return found


def draw_pair(axis: Any, m: Describer, query: Path, candidate: Path, colour: str, title: str) -> None:
    """A query beside a candidate in a frame of a colour, with their matches."""
    a, b = m.local([query, candidate])
    left, right = (_seen(m, file, of) for file, of in ((query, a), (candidate, b)))
    gap = np.full((len(left), 4, 3), 255, dtype=np.uint8)
    axis.imshow(np.concatenate([left, gap, right], axis=1))
    match = m.match(a, b)
    scale = np.array(left.shape[1::-1]) / np.array(a.size[::-1])
    a_M2, b_M2 = match.points_a_M2 * scale, match.points_b_M2 * scale + [left.shape[1] + 4, 0]
    for agrees, line in ((False, OTHER), (True, COUNTED)):
        for (ax, ay), (bx, by) in zip(a_M2[match.agrees_M == agrees], b_M2[match.agrees_M == agrees], strict=True):
            axis.plot([ax, bx], [ay, by], color=line, linewidth=1.1 if agrees else 0.6, alpha=0.9 if agrees else 0.6)
    size = right.shape[1], right.shape[0]
    axis.add_patch(Rectangle((left.shape[1] + 4, 0), *size, fill=False, edgecolor=colour, linewidth=5))
    axis.set_title(f"{title}: cosine {match.similarity:.2f}, {int(match.agrees_M.sum())} matches count", fontsize=10)
    axis.set_axis_off()


def _seen(m: Describer, file: Path, of: LocalImage) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image_3HW = pixels_of(file, m.config, m.model.spec.patch).image_3HW
    return dim_others(image_3HW.permute(1, 2, 0).numpy(), of.cell_N2, of.grid)


def main() -> int:
    """Draws the picture beside this file."""
    m = rerankvpr.load("runs/demo")
    (town,) = load_benchmarks(["town"], Path("data"))
    chosen = rescued(m, town)[:ROWS]
    figure = Figure(figsize=(10.4, 2.5 * len(chosen)), layout="constrained")
    for row, (q, before, after) in zip(figure.subplots(len(chosen), 2, squeeze=False), chosen, strict=True):
        draw_pair(row[0], m, town.queries[q], town.database[before], WRONG, "retrieved first (wrong)")
        draw_pair(row[1], m, town.queries[q], town.database[after], RIGHT, "re-ranked first (right)")
    figure.savefig(Path(__file__).with_suffix(".jpg"), dpi=100, pil_kwargs={"quality": 85, "optimize": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
