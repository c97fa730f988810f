"""What re-ranking matched: a query beside its first candidates, salient patches light, matches as lines."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.describer import Describer, LocalImage
from eval.given_images import pixels_of

MOST_LINES = 60
SIDE = 200  # pixels of a picture's side


@dataclass(frozen=True)
class Pair:
    """A query and one of its candidates, by their files."""

    query: Path
    candidate: Path
    caption: str


def draw_pairs(describer: Describer, pairs: Sequence[Pair]) -> list[str]:
    """A figure in HTML for each pair. Raises ValueError or OSError naming an image that cannot be read."""
    files = list(dict.fromkeys([path for pair in pairs for path in (pair.query, pair.candidate)]))
    kept = dict(zip(files, describer.local(files), strict=True)) if files else {}
    pictures = {path: _masked_jpeg(describer, path, local) for path, local in kept.items()}
    return [_figure(describer, pair, kept, pictures) for pair in pairs]


def _figure(describer: Describer, pair: Pair, kept: dict[Path, LocalImage], pictures: dict[Path, str]) -> str:
    query, candidate = kept[pair.query], kept[pair.candidate]
    match = describer.match(query, candidate)
    a_M2 = match.points_a_M2 / np.array(query.size[::-1]) * SIDE
    b_M2 = match.points_b_M2 / np.array(candidate.size[::-1]) * SIDE + [SIDE, 0]
    lines = []
    for agrees, style in ((False, 'stroke="#9aa0a6" opacity="0.5"'), (True, 'stroke="#39d6ff" opacity="0.9"')):
        chosen = (match.agrees_M == agrees) & np.isfinite(a_M2).all(axis=1) & np.isfinite(b_M2).all(axis=1)
        ends = np.concatenate([a_M2[chosen], b_M2[chosen]], axis=1)[:MOST_LINES].tolist()
        lines += [f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{u:.0f}" y2="{v:.0f}" {style}/>' for x, y, u, v in ends]
    counted = int(match.agrees_M.sum())
    said = f"{pair.caption}; {counted} of {len(match.cosine_M)} matches score, cosine {match.similarity:.2f}"
    images = "".join(
        f'<image href="data:image/jpeg;base64,{pictures[path]}" x="{x}" width="{SIDE}" height="{SIDE}" '
        'preserveAspectRatio="none"/>'
        for path, x in ((pair.query, 0), (pair.candidate, SIDE))
    )
    return (
        f'<figure><svg viewBox="0 0 {2 * SIDE} {SIDE}" role="img" aria-label="{escape(said)}">{images}{"".join(lines)}'
        f"</svg><figcaption>{escape(said)}</figcaption></figure>"
    )


def _masked_jpeg(describer: Describer, path: Path, local: LocalImage) -> str:
    """The image as the network gets it, patches dark that are too little salient to match; base64."""
    image_3HW = pixels_of(path, describer.config, describer.model.spec.patch).image_3HW
    image = Image.fromarray(dim_others(image_3HW.permute(1, 2, 0).numpy(), local.cell_N2, local.grid))
    data = io.BytesIO()
    image.resize((SIDE, SIDE)).save(data, "JPEG", quality=75)
    return base64.b64encode(data.getvalue()).decode()


def dim_others(image_HW3: NDArray[np.uint8], cell_N2: NDArray[np.int64], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """An image with the patches dark that are not among the cells (row, column)."""
    kept = np.zeros(grid, dtype=bool)
    on_grid = (cell_N2 < np.array(grid)).all(axis=1)
    kept[tuple(cell_N2[on_grid].T)] = True
    height, width = len(image_HW3) // grid[0], image_HW3.shape[1] // grid[1]
    light = np.where(kept, 1.0, 0.4).repeat(height, axis=0).repeat(width, axis=1)
    dimmed: NDArray[np.uint8] = (image_HW3 * light[..., None]).astype(np.uint8)
    return dimmed
