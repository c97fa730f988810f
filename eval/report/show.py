"""What a network sees of given images: attention of its heads, its patches as colours, matches, similar patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_pipeline.images import normalise
from eval.describer import Describer
from eval.given_images import GivenImage, pixels_of
from eval.local_features import grid_of, min_max
from eval.report.figures import short_name
from eval.report.match_pictures import dim_others

FACETS = ("query", "key", "value")
SCORES, OTHER = "#39d6ff", "#9aa0a6"
MOST_LINES = 80
KEPT_PERCENT = (2, 98)  # of a component's values; what is beyond them has the colours at the ends


@dataclass(frozen=True)
class Seen:
    """One image and what one block makes of its N patches."""

    name: str
    image_HW3: NDArray[np.uint8]
    grid: tuple[int, int]  # rows and columns of patches
    facet_NC: torch.Tensor  # float32, L2-normalised
    attention_HN: torch.Tensor  # each head's CLS attention to the patches, after the softmax over all tokens


@torch.inference_mode()
def see(describer: Describer, images: Sequence[GivenImage], *, layer: int, facet: str = "value") -> list[Seen]:
    """Each image, resized by the network's own rule, with a facet and the CLS attention of a block.

    `layer` counts from the last if it is negative. Raises ValueError naming the image or the layer.
    """
    backbone = describer.model.backbone
    depth, heads = len(backbone.blocks), backbone.spec.heads
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer}: the backbone has {depth} blocks; use {-depth} to {depth - 1}")
    taken: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    handles = backbone.watch(layer % depth, lambda *qkv: taken.append(qkv))
    seen = []
    try:
        for number, given in enumerate(images):
            name = _name(given, number)
            pixels = pixels_of(given, describer.config, describer.model.spec.patch, name)
            inputs = normalise(pixels.image_3HW[None].to(describer.device))
            taken.clear()
            describer.model(inputs)
            grid = grid_of(describer.model, inputs)
            patches = grid[0] * grid[1]
            query_TC, key_TC, _ = (x[0].float().cpu() for x in taken[0])
            query_Hd, key_THd = query_TC[0].unflatten(-1, (heads, -1)), key_TC.unflatten(-1, (heads, -1))
            logits_HT = torch.einsum("hd,thd->ht", query_Hd, key_THd) * query_Hd.shape[-1] ** -0.5
            facet_TC = taken[0][FACETS.index(facet)][0].float().cpu()
            seen.append(
                Seen(
                    name,
                    pixels.image_3HW.permute(1, 2, 0).numpy(),
                    grid,
                    F.normalize(facet_TC[-patches:], dim=-1),
                    logits_HT.softmax(dim=-1)[:, -patches:],
                )
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def draw_attention(path: Path, seen: Sequence[Seen]) -> None:
    """One row per image: the image, the mean over heads, then each head's CLS attention, each scaled to itself."""
    heads = len(seen[0].attention_HN)
    axes, save = _canvas(path, len(seen), 2 + heads)
    for row, one in zip(axes, seen, strict=True):
        _picture(row[0], one, one.name)
        maps_XN = torch.cat([one.attention_HN.mean(dim=0, keepdim=True), one.attention_HN])
        for axis, heat_N, title in zip(
            row[1:], min_max(maps_XN), ["mean of heads", *(f"head {head}" for head in range(heads))], strict=True
        ):
            _heat(axis, one, heat_N, title)
    save()


def draw_pca(path: Path, seen: Sequence[Seen]) -> None:
    """Each image beside its patches, coloured by the three main components of the patches of all images together."""
    colours = patch_colours([one.facet_NC for one in seen])
    axes, save = _canvas(path, len(seen), 2)
    for row, one, colour_N3 in zip(axes, seen, colours, strict=True):
        _picture(row[0], one, one.name)
        height, width = one.image_HW3.shape[:2]
        row[1].imshow(colour_N3.reshape(*one.grid, 3), extent=(0, width, height, 0), interpolation="nearest")
        row[1].set_title("like colours: like patches", fontsize=8)
    save()


def patch_colours(facets: Sequence[torch.Tensor]) -> list[NDArray[np.float32]]:
    """RGB from 0 to 1 for the patches [N, C] of each image: the first three principal components over all of them.

    Consistent over the images: one colour is one direction. A component's sign is that which makes its largest
    loading positive.
    """
    every_PC = torch.cat(list(facets)).double()
    centred_PC = every_PC - every_PC.mean(dim=0)
    _, _, axes_XC = torch.linalg.svd(centred_PC, full_matrices=False)
    axes_XC = axes_XC[:3]
    largest_X = axes_XC.gather(1, axes_XC.abs().argmax(dim=1, keepdim=True))
    shown_P3 = F.pad((centred_PC @ (axes_XC * largest_X.sign()).T), (0, 3 - len(axes_XC))).numpy()
    low_3, high_3 = np.percentile(shown_P3, KEPT_PERCENT, axis=0)
    scaled_P3 = np.clip((shown_P3 - low_3) / np.maximum(high_3 - low_3, 1e-12), 0, 1).astype(np.float32)
    return np.split(scaled_P3, np.cumsum([len(facet) for facet in facets])[:-1])


def draw_similarity(path: Path, seen: Sequence[Seen], point: tuple[float, float]) -> None:
    """The cosine of one patch of the first image with all patches of each image, and where it is largest.

    `point` is (x, y) of the patch, as shares of width and height.
    """
    first = seen[0]
    rows, columns = first.grid
    x, y = point
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"point {x:g} {y:g}: expected shares of width and height, from 0 to 1")
    cell = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
    patch_C = first.facet_NC[cell[0] * columns + cell[1]]
    axes, save = _canvas(path, len(seen), 2)
    for number, (row, one) in enumerate(zip(axes, seen, strict=True)):
        cosine_N = one.facet_NC @ patch_C
        _picture(row[0], one, f"{one.name}: the patch" if number == 0 else one.name)
        best = int(cosine_N.argmax())
        _heat(row[1], one, cosine_N, f"cosine {float(cosine_N.min()):.2f} to {float(cosine_N.max()):.2f}")
        _mark(row[0], one, (cell if number == 0 else divmod(best, one.grid[1])))
        _mark(row[1], one, divmod(best, one.grid[1]))
    save()


def draw_matches(path: Path, describer: Describer, query: GivenImage, candidates: Sequence[GivenImage]) -> None:
    """A row for each candidate: its mutual matches with the query by the re-ranking's rule.

    Matches that score are blue, those that agree on no common shift are grey, and the patches that are too little
    salient to match are dark.
    """
    images = [query, *candidates]
    kept = describer.local(images)
    pixels = [pixels_of(given, describer.config, describer.model.spec.patch).image_3HW for given in images]
    names = [_name(given, number) for number, given in enumerate(images)]
    axes, save = _canvas(path, len(candidates), 1, wide=2.0)
    for (axis,), other, image_3HW, name in zip(axes, kept[1:], pixels[1:], names[1:], strict=True):
        match = describer.match(kept[0], other)
        left, right = (
            dim_others(one_3HW.permute(1, 2, 0).numpy(), of.cell_N2, of.grid)
            for one_3HW, of in ((pixels[0], kept[0]), (image_3HW, other))
        )
        height = max(len(left), len(right))
        canvas = np.full((height, left.shape[1] + right.shape[1], 3), 255, dtype=np.uint8)
        canvas[: len(left), : left.shape[1]], canvas[: len(right), left.shape[1] :] = left, right
        axis.imshow(canvas)
        scales = [
            np.array(p.shape[:0:-1]) / np.array(k.size[::-1]) for p, k in ((pixels[0], kept[0]), (image_3HW, other))
        ]
        a_M2, b_M2 = match.points_a_M2 * scales[0], match.points_b_M2 * scales[1] + [left.shape[1], 0]
        for agrees, colour, alpha in ((False, OTHER, 0.4), (True, SCORES, 0.8)):
            ends_L22 = np.stack([a_M2, b_M2], axis=1)[match.agrees_M == agrees][:MOST_LINES]
            for x, y in ends_L22.transpose(0, 2, 1):
                axis.plot(x, y, color=colour, alpha=alpha, linewidth=0.7, marker="o", markersize=1.5)
        counted = int(match.agrees_M.sum())
        said = f"{len(match.cosine_M)} matches, {counted} of them score; cosine {match.similarity:.2f}"
        axis.set_title(f"{names[0]} and {name}\n{said}", fontsize=8)
    save()


def _canvas(path: Path, rows: int, columns: int, *, wide: float = 1.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * columns * wide * (1.4 if columns == 1 else 1), 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)

    return axes, save


def _picture(axis: Any, one: Seen, title: str) -> None:
    axis.imshow(one.image_HW3)
    axis.set_title(title.replace("/", "/\n"), fontsize=8)


def _heat(axis: Any, one: Seen, heat_N: torch.Tensor, title: str) -> None:
    height, width = one.image_HW3.shape[:2]
    axis.imshow(
        heat_N.reshape(one.grid).numpy(), extent=(0, width, height, 0), cmap="inferno", interpolation="bilinear"
    )
    axis.set_title(title, fontsize=8)


def _mark(axis: Any, one: Seen, cell: tuple[int, int]) -> None:
    height, width = (side / cells for side, cells in zip(one.image_HW3.shape[:2], one.grid, strict=True))
    axis.plot(
        (cell[1] + 0.5) * width, (cell[0] + 0.5) * height, marker="s", markersize=9, color=SCORES, fillstyle="none"
    )


def _name(given: GivenImage, number: int) -> str:
    return short_name(Path(given)) if isinstance(given, str | Path) else f"image {number}"
