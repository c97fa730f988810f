"""Pictures of an evaluation: queries with their candidates, and what the re-ranker saw of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from configs.files import replacing
from configs.schema import EvalConfig, RerankConfig
from data_pipeline.images import normalise, read_image
from eval.benchmarks.benchmark import Benchmark
from eval.local_features import NO_CELL, LocalFeatures, compact, grid_of, read_local
from eval.matching import Matches, agreeing, mutual_matches
from eval.pixels import load_image
from eval.report.figures import BLUE, ORANGE, TEXT, short_name
from eval.result import Result
from model.network import PlaceModel

mpl.use("Agg")

COLOURS = {True: BLUE, False: ORANGE, None: None}
MARKS = {True: " ✓", False: " ✗", None: ""}  # so that colours are not needed
SHOWN = 3
NAME = 14  # characters of a query's name above its picture
LINES = 60
SCORING: dict[str, Any] = {"color": "#39d6ff", "alpha": 0.8}
OTHERS: dict[str, Any] = {"color": "#9aa0a6", "alpha": 0.35}


def draw_pictures(
    folder: Path, benchmark: Benchmark, result: Result, model: PlaceModel, config: EvalConfig
) -> list[Path]:
    """Pictures of `config.pictures` queries, wrong ones first: `retrieval.png`, and `matches.png` if re-ranked."""
    if not config.pictures:
        return []
    final_QK = result.predictions_QK if result.reranked_QK is None else result.reranked_QK
    drawn = {q: _is_right(benchmark, q, int(row[0])) for q, row in enumerate(final_QK) if row[0] >= 0}
    wrong, right, unknown = ([q for q, is_right in drawn.items() if is_right is v] for v in (False, True, None))
    wanted = config.pictures
    num_wrong = min(len(wrong), max(wanted - len(right), wanted // 2 + wanted % 2))
    chosen = _spread(wrong, num_wrong) + _spread(right, wanted - num_wrong)
    chosen += _spread(unknown, wanted - len(chosen))
    if not chosen:  # a query that cannot be read has no candidate
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_draw_retrieval(folder / "retrieval.png", benchmark, result, chosen)]
    if result.reranked_QK is not None:
        paths.append(_draw_matches(folder / "matches.png", benchmark, result.reranked_QK, chosen, model, config))
    return paths


def _is_right(benchmark: Benchmark, query: int, number: int) -> bool | None:
    """Whether a database image shows the place of a query; None if nobody knows."""
    if not benchmark.is_labelled_Q[query]:
        return None
    return bool(np.isin(number, benchmark.positives(query)))


def _spread(items: list[int], n: int) -> list[int]:
    """At most n of the items, evenly spread."""
    return [items[i] for i in sorted({int(x) for x in np.linspace(0, len(items) - 1, n)})] if items and n else []


def _frame(axis: Any, path: Path, title: str, colour: str | None) -> None:
    axis.imshow(read_image(path, 224).permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=TEXT - 1)
    for spine in axis.spines.values():
        spine.set_visible(colour is not None)
        spine.set_color(colour or "black")
        spine.set_linewidth(4)


def _draw_retrieval(path: Path, benchmark: Benchmark, result: Result, chosen: list[int]) -> Path:
    from matplotlib.figure import Figure

    stages = [("retrieved", result.predictions_QK)]
    if result.reranked_QK is not None:
        stages.append(("re-ranked", result.reranked_QK))
    shown = min(SHOWN, *(ranked_QK.shape[1] for _, ranked_QK in stages))  # fewer of a shallow search, or small database
    columns = 1 + shown * len(stages)
    figure = Figure(figsize=(1.7 * columns, 1.9 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, query in zip(axes, chosen, strict=True):
        _frame(row[0], benchmark.queries[query], f"query {benchmark.queries[query].stem[-NAME:]}", None)
        for stage, (label, predictions_QK) in enumerate(stages):
            for place in range(shown):
                number = int(predictions_QK[query, place])
                if number < 0:
                    row[1 + stage * shown + place].set_axis_off()
                    continue
                is_right = _is_right(benchmark, query, number)
                title = f"{label} {place + 1}{MARKS[is_right]}"
                _frame(row[1 + stage * shown + place], benchmark.database[number], title, COLOURS[is_right])
    told = "\n✓, blue: the place of the query; ✗, orange: another place" if benchmark.num_labelled else ""
    figure.suptitle(f"{benchmark.name} ({benchmark.protocol}){told}", fontsize=TEXT)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return path


@torch.inference_mode()
def _draw_matches(
    path: Path,
    benchmark: Benchmark,
    ranked_QK: np.ndarray,
    chosen: list[int],
    model: PlaceModel,
    config: EvalConfig,
) -> Path:
    """Saliency and mutual matches of each query with its best candidate, of features before any projection.

    Matches that score are blue; those that do not agree with them on a shift are grey.
    """
    from matplotlib.figure import Figure

    was_training = model.training
    model.eval()
    figure = Figure(figsize=(8.4, 2.4 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2, squeeze=False, width_ratios=(2, 2))
    for (left, right), query in zip(axes, chosen, strict=True):
        number = int(ranked_QK[query, 0])
        images = [
            load_image(p, config, model.spec.patch) for p in (benchmark.queries[query], benchmark.database[number])
        ]
        features, heats = zip(*(_read_one(image, model, config) for image in images), strict=True)
        codes_PC = [f.codes_PC.float() * f.scale_P[:, None] for f in features]
        sim_NM = torch.zeros(max(1, len(codes_PC[0])), max(1, len(codes_PC[1])), device=codes_PC[0].device)
        sim_NM[: len(codes_PC[0]), : len(codes_PC[1])] = codes_PC[0] @ codes_PC[1].T
        matches = mutual_matches(sim_NM[None, :, None], config.rerank.nn_match_thresh)
        picture, shift = _side_by_side(images)
        for image, heat, start in zip(images, heats, (0, shift), strict=True):
            height, width = image.shape[1:]
            left.imshow(
                heat, extent=(start, start + width, height, 0), cmap="inferno", interpolation="bilinear", zorder=1
            )
        left.imshow(picture, alpha=0.45, zorder=2)
        names = [short_name(file) for file in (benchmark.queries[query], benchmark.database[number])]
        left.set_title(f"{names[0]}\nand its first candidate: CLS attention", fontsize=TEXT - 1)
        right.imshow(picture)
        matched, scoring = _matches(matches, features, config.rerank)
        side = model.spec.patch
        for patches, style in ((matched[~scoring], OTHERS), (matched[scoring], SCORING)):
            for patch in [p for p in patches.tolist() if int(features[0].cell_P2[p, 0]) != NO_CELL][:LINES]:
                other = int(matches.nearest_BNT[0, patch, 0])
                (y0, x0), (y1, x1) = features[0].cell_P2[patch].tolist(), features[1].cell_P2[other].tolist()
                x, y = [(x0 + 0.5) * side, shift + (x1 + 0.5) * side], [(y0 + 0.5) * side, (y1 + 0.5) * side]
                right.plot(x, y, linewidth=0.6, marker="o", markersize=1.5, **style)
        is_right = _is_right(benchmark, query, number)
        verdict = {True: ": the place", False: ": another place", None: ""}[is_right]
        agree = "" if config.rerank.geometry == "none" else f", {int(scoring.sum())} agree on a shift"
        shown = f"; {LINES} drawn" if int(scoring.sum()) > LINES else ""
        title = f"{names[1]}\n{len(matched)} matches{agree}{shown}{verdict}{MARKS[is_right]}"
        right.set_title(title, fontsize=TEXT - 1, color=COLOURS[is_right] or "black")
        for axis in (left, right):
            axis.set_axis_off()
            axis.set_xlim(0, picture.shape[1])
            axis.set_ylim(picture.shape[0], 0)
    figure.suptitle(f"{benchmark.name}: what re-ranking sees", fontsize=TEXT)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    model.train(was_training)
    return path


def _matches(
    matches: Matches, features: tuple[LocalFeatures, ...], rerank: RerankConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matched patches of the query, the most alike first, and which of them score."""
    matched = torch.nonzero(matches.matched_BNT[0, :, 0]).flatten()
    cosine = matches.cosine_BNT[0, matched, 0]
    order = cosine.argsort(descending=True)
    matched, cosine = matched[order], cosine[order]
    if rerank.geometry == "none":
        return matched, torch.ones_like(matched, dtype=torch.bool)
    own_X2 = features[0].cell_P2[matched].long()
    other_X2 = features[1].cell_P2[matches.nearest_BNT[0, matched, 0]].long()
    on_grid = (own_X2[:, 0] != NO_CELL) & (other_X2[:, 0] != NO_CELL)
    weight = cosine if rerank.score == "similarity_sum" else torch.ones_like(cosine)
    scoring = torch.zeros_like(on_grid)
    scoring[on_grid] = agreeing((other_X2 - own_X2)[on_grid], weight[on_grid], rerank.geometry_cells)
    return matched, scoring


def _read_one(image: torch.Tensor, model: PlaceModel, config: EvalConfig) -> tuple[LocalFeatures, np.ndarray]:
    inputs = normalise(image[None].to(model.device))
    _, local_BNC, saliency_BN = read_local(model, inputs, config.rerank)
    features = compact(local_BNC, saliency_BN, grid_of(model, inputs), config.rerank)
    heat = saliency_BN[0].unflatten(0, grid_of(model, inputs)).cpu().numpy()
    return features, heat


def _side_by_side(images: list[torch.Tensor]) -> tuple[np.ndarray, int]:
    """Two images on one canvas, and where the second begins."""
    height = max(image.shape[1] for image in images)
    canvas = torch.full((3, height, sum(image.shape[2] for image in images)), 255, dtype=torch.uint8)
    x = 0
    for image in images:
        canvas[:, : image.shape[1], x : x + image.shape[2]] = image
        x += image.shape[2]
    return canvas.permute(1, 2, 0).numpy(), images[0].shape[2]
