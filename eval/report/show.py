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
from eval.report.figures import HEAT, TEXT, new_figure, save_figure, short_name
from eval.report.match_pictures import dim_others

FACETS = ("query", "key", "value")
SCORES, OTHER = "#39d6ff", "#9aa0a6"
WIDEST_TITLE = 22  # characters over a picture
MOST_LINES = 80
MOST_COLUMNS, MOST_PAIRS = 8, 2  # of a figure: a wider one is not legible on a page
PANEL = 2.4  # inches of an image's side
GAP = 6  # pixels between the images of a pair
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
    """Each image, the mean over heads and each head's CLS attention, each scaled to itself; heads go on below."""
    heads = len(seen[0].attention_HN)
    columns = min(2 + heads, MOST_COLUMNS)
    deep = -(-(2 + heads) // columns)
    figure, axes = _canvas(deep * len(seen), columns)
    titles = ["mean of heads", *(f"head {head}" for head in range(heads))]
    size = TEXT - 1 if columns <= 2 * MOST_PAIRS else TEXT + 3
    for number, one in enumerate(seen):
        panels = axes[deep * number : deep * (number + 1)].flat
        _picture(next(panels), one, one.name)
        maps_XN = torch.cat([one.attention_HN.mean(dim=0, keepdim=True), one.attention_HN])
        for axis, heat_N, title in zip(panels, min_max(maps_XN), titles, strict=False):
            shown = _heat(axis, one, heat_N, "")
            axis.set_title(title, fontsize=size)
    bar = _colour_bar(figure, axes, shown, "attention of the class token, each map scaled to itself")
    bar.set_ticks([0, 1], labels=["least", "most"], fontsize=size)
    bar.ax.xaxis.label.set_fontsize(size)
    save_figure(figure, path)


def draw_pca(path: Path, seen: Sequence[Seen]) -> None:
    """Each image beside its patches, coloured by the three main components of the patches of all images together."""
    colours = patch_colours([one.facet_NC for one in seen])
    across = min(len(seen), MOST_PAIRS)
    figure, axes = _canvas(-(-len(seen) // across), 2 * across)
    panels = axes.flat
    for one, colour_N3 in zip(seen, colours, strict=True):
        _picture(next(panels), one, one.name)
        height, width = one.image_HW3.shape[:2]
        axis = next(panels)
        axis.imshow(colour_N3.reshape(*one.grid, 3), extent=(0, width, height, 0), interpolation="nearest")
        axis.set_title("its patches", fontsize=TEXT - 1)
    figure.supxlabel("like colours: like patches, in all images (red, green, blue: main components)", fontsize=TEXT)
    save_figure(figure, path)


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

    `point` is (x, y) of the patch, as shares of width and height. All images have one scale of colours, up to the
    largest cosine of another image's patch.
    """
    first = seen[0]
    rows, columns = first.grid
    x, y = point
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"point {x:g} {y:g}: expected shares of width and height, from 0 to 1")
    cell = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
    patch_C = first.facet_NC[cell[0] * columns + cell[1]]
    cosines = [one.facet_NC @ patch_C for one in seen]
    low = min(float(cosine_N.min()) for cosine_N in cosines)
    high = max(float(cosine_N.max()) for cosine_N in cosines[1:] or cosines)
    across = min(len(seen), MOST_PAIRS)
    figure, axes = _canvas(-(-len(seen) // across), 2 * across)
    panels = axes.flat
    for number, (one, cosine_N) in enumerate(zip(seen, cosines, strict=True)):
        best = divmod(int(cosine_N.argmax()), one.grid[1])
        left, right = next(panels), next(panels)
        _picture(left, one, f"{one.name}{': the patch' if number == 0 else ''}")
        shown = _heat(right, one, cosine_N, f"largest {float(cosine_N.max()):.2f}", low, max(high, low + 1e-6))
        _mark(left, one, cell if number == 0 else best)
        _mark(right, one, best)
    _colour_bar(figure, axes, shown, "cosine with the patch; square: the patch, and where the cosine is largest")
    save_figure(figure, path)


def draw_matches(path: Path, describer: Describer, pairs: Sequence[tuple[GivenImage, GivenImage]]) -> None:
    """For each pair, a query and a candidate: their mutual matches by the re-ranking's rule.

    Matches that score are blue, those that agree on no common shift are grey, and the patches that are too little
    salient to match are dark.
    """
    from matplotlib.lines import Line2D

    images = {id(given): given for pair in pairs for given in pair}
    kept = dict(zip(images, describer.local(list(images.values())), strict=True))
    pixels = {
        key: pixels_of(given, describer.config, describer.model.spec.patch).image_3HW for key, given in images.items()
    }
    names = {key: _name(given, number) for number, (key, given) in enumerate(images.items())}
    across = min(len(pairs), MOST_PAIRS)
    figure, axes = _canvas(-(-len(pairs) // across), across, wide=2.0)
    for axis, (query, candidate) in zip(axes.flat, pairs, strict=False):
        keys = id(query), id(candidate)
        one, other = (kept[key] for key in keys)
        match = describer.match(one, other)
        left, right = (
            dim_others(pixels[key].permute(1, 2, 0).numpy(), kept[key].cell_N2, kept[key].grid) for key in keys
        )
        height, start = max(len(left), len(right)), left.shape[1] + GAP
        canvas = np.full((height, start + right.shape[1], 3), 255, dtype=np.uint8)
        canvas[: len(left), : left.shape[1]], canvas[: len(right), start:] = left, right
        axis.imshow(canvas)
        scales = [np.array(pixels[key].shape[:0:-1]) / np.array(kept[key].size[::-1]) for key in keys]
        a_M2, b_M2 = match.points_a_M2 * scales[0], match.points_b_M2 * scales[1] + [start, 0]
        for agrees, colour, alpha in ((False, OTHER, 0.8), (True, SCORES, 0.9)):
            ends_L22 = np.stack([a_M2, b_M2], axis=1)[match.agrees_M == agrees][:MOST_LINES]
            for x, y in ends_L22.transpose(0, 2, 1):
                axis.plot(x, y, color=colour, alpha=alpha, linewidth=1, marker="o", markersize=2)
        counted = int(match.agrees_M.sum())
        said = f"{counted} of {len(match.cosine_M)} matches score, cosine {match.similarity:.2f}"
        axis.set_title(f"{names[keys[0]]}\n{names[keys[1]]}\n{said}", fontsize=TEXT - 1)
    lines = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in (SCORES, OTHER)]
    legend = ["matches that score", "matches that agree on no common shift (dark: too little salient to match)"]
    figure.legend(lines, legend, loc="outside lower center", ncols=2 if across > 1 else 1, fontsize=TEXT - 1)
    save_figure(figure, path)


def _canvas(rows: int, columns: int, *, wide: float = 1.0) -> tuple[Any, Any]:
    """A figure with a grid of axes that have no frames."""
    figure = new_figure(PANEL * columns * wide, (PANEL + 0.3 + 0.15 * wide) * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _picture(axis: Any, one: Seen, title: str) -> None:
    axis.imshow(one.image_HW3)
    folder, slash, name = title.rpartition("/")
    if len(name) > WIDEST_TITLE:
        half = WIDEST_TITLE // 2
        name = f"{name[:half].rstrip('.')}...{name[-half:].lstrip('.')}"
    axis.set_title(f"{folder}{slash}\n{name}" if slash else name, fontsize=TEXT - 1)


def _heat(axis: Any, one: Seen, heat_N: torch.Tensor, title: str, low: float = 0, high: float = 1) -> Any:
    height, width = one.image_HW3.shape[:2]
    extent = (0, width, height, 0)
    heat = heat_N.reshape(one.grid).numpy()
    shown = axis.imshow(heat, extent=extent, cmap=HEAT, interpolation="bilinear", vmin=low, vmax=high)
    axis.set_title(title, fontsize=TEXT - 1)
    return shown


def _colour_bar(figure: Any, axes: Any, shown: Any, label: str) -> Any:
    """What the colours of heat maps mean, below them."""
    bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=min(1.0, 3 / axes.shape[1]), aspect=40, pad=0.02)
    bar.set_label(label, fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    return bar


def _mark(axis: Any, one: Seen, cell: tuple[int, int]) -> None:
    height, width = (side / cells for side, cells in zip(one.image_HW3.shape[:2], one.grid, strict=True))
    axis.plot(
        (cell[1] + 0.5) * width, (cell[0] + 0.5) * height, marker="s", markersize=9, color=SCORES, fillstyle="none"
    )


def _name(given: GivenImage, number: int) -> str:
    return short_name(Path(given)) if isinstance(given, str | Path) else f"image {number}"
