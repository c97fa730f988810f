"""Tables, `results.json` and pictures of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.table import Table

from configs.schema import EvalConfig
from data_pipeline.images import normalise, read_image
from eval.benchmarks import Benchmark
from eval.evaluate import Result
from eval.rerank import mutual_matches
from model.network import PlaceModel

mpl.use("Agg")

RIGHT, WRONG = "#2e9e4f", "#cc3b3b"
SHOWN = 3
LINES = 60


def results_table(results: list[Result]) -> Table:
    """First stage and re-ranked, a row each, with protocol and cost."""
    table = Table(title="Recall in %", title_justify="left")
    table.add_column("benchmark, protocol", overflow="fold")
    table.add_column("stage")
    for k in results[0].recall:
        table.add_column(f"R@{k}", justify="right")
    table.add_column("cost", justify="right")
    for result in results:
        ms = {name: f"{1000 * seconds:.2f} ms" for name, seconds in result.timings.items()}
        what = f"{result.name}\n{result.protocol}\n{result.num_queries} queries in {result.num_database}"
        cost = f"{ms['extraction_s_per_image']}/image\n{ms['retrieval_s_per_query']}/query"
        table.add_row(what, "retrieved", *(f"{v:.1f}" for v in result.recall.values()), cost)
        if result.recall_reranked:
            recalls = (f"{v:.1f}" for v in result.recall_reranked.values())
            table.add_row("", "re-ranked", *recalls, f"{ms['rerank_s_per_query']}/query")
        table.add_section()
    return table


def write_results(path: Path, results: list[Result], *, model: str, before: list[dict[str, Any]] | None = None) -> None:
    """`results.json`: the model, and for each benchmark protocol, recall by K before and after re-rank, and timings.

    `before` holds results of the untrained model. The file appears whole or not at all.
    """
    content: dict[str, Any] = {"model": model, "results": [result.as_dict() for result in results]}
    if before is not None:
        content["before"] = before
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def draw_pictures(
    folder: Path, benchmark: Benchmark, result: Result, model: PlaceModel, config: EvalConfig
) -> list[Path]:
    """Pictures of `config.pictures` queries, wrong ones first: `retrieval.png`, and `matches.png` if re-ranked."""
    if not config.pictures:
        return []
    final_QK = result.predictions_QK if result.reranked_QK is None else result.reranked_QK
    is_right = [bool(np.isin(row[0], benchmark.positives(q))) for q, row in enumerate(final_QK)]
    wrong = [q for q, right in enumerate(is_right) if not right]
    right = [q for q, right in enumerate(is_right) if right]
    wanted = config.pictures
    num_wrong = min(len(wrong), max(wanted - len(right), wanted // 2 + wanted % 2))
    chosen = _spread(wrong, num_wrong) + _spread(right, wanted - num_wrong)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_draw_retrieval(folder / "retrieval.png", benchmark, result, chosen)]
    if result.reranked_QK is not None:
        paths.append(_draw_matches(folder / "matches.png", benchmark, result.reranked_QK, chosen, model, config))
    return paths


def _spread(items: list[int], n: int) -> list[int]:
    """At most n of the items, evenly spread."""
    return [items[i] for i in sorted({int(x) for x in np.linspace(0, len(items) - 1, n)})] if items and n else []


def _frame(axis: Any, path: Path, title: str, colour: str | None) -> None:
    axis.imshow(read_image(path, 224).permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8)
    for spine in axis.spines.values():
        spine.set_visible(colour is not None)
        spine.set_color(colour or "black")
        spine.set_linewidth(4)


def _draw_retrieval(path: Path, benchmark: Benchmark, result: Result, chosen: list[int]) -> Path:
    from matplotlib.figure import Figure

    stages = [("retrieved", result.predictions_QK)]
    if result.reranked_QK is not None:
        stages.append(("re-ranked", result.reranked_QK))
    shown = min(SHOWN, result.num_database)
    columns = 1 + shown * len(stages)
    figure = Figure(figsize=(1.7 * columns, 1.85 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, query in zip(axes, chosen, strict=True):
        _frame(row[0], benchmark.queries[query], f"query {query}", None)
        for stage, (label, predictions_QK) in enumerate(stages):
            for place in range(shown):
                number = int(predictions_QK[query, place])
                colour = RIGHT if number in benchmark.positives(query) else WRONG
                _frame(row[1 + stage * shown + place], benchmark.database[number], f"{label} {place + 1}", colour)
    figure.suptitle(f"{benchmark.name} ({benchmark.protocol}): green is the place of the query", fontsize=10)
    figure.savefig(path, dpi=90)
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
    """Saliency and mutual matches of each query with its best candidate."""
    from matplotlib.figure import Figure

    from eval.extract import salient

    side, rerank = config.image_size, config.rerank
    cells = side // model.backbone.patch_embed.patch_size[0]
    was_training = model.training
    model.eval()
    figure = Figure(figsize=(8.4, 2.25 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2, squeeze=False, width_ratios=(2, 2))
    for (left, right), query in zip(axes, chosen, strict=True):
        number = int(ranked_QK[query, 0])
        pair = torch.stack([read_image(p, side) for p in (benchmark.queries[query], benchmark.database[number])])
        out = model.read_out(
            normalise(pair.to(model.device)),
            layer=rerank.layer,
            facet=rerank.facet,
            saliency_layer=rerank.saliency_layer,
        )
        masks = salient(out.saliency_BN, rerank.saliency_thresh)
        matched_1N, nearest_1N, cosine_1N = mutual_matches(
            out.local_BNC[0], masks[0], out.local_BNC[1:], masks[1:], nn_match_thresh=rerank.nn_match_thresh
        )
        picture = torch.cat(list(pair), dim=2).permute(1, 2, 0).numpy()
        heat = torch.cat([s.unflatten(0, (cells, cells)) for s in out.saliency_BN], dim=1).cpu().numpy()
        left.imshow(picture)
        left.imshow(heat, extent=(0, 2 * side, side, 0), cmap="inferno", alpha=0.55, interpolation="bilinear")
        left.set_title(f"query {query} and its best candidate: CLS attention", fontsize=8)
        right.imshow(picture)
        matched = torch.nonzero(matched_1N[0]).flatten()
        strongest = matched[cosine_1N[0][matched].argsort(descending=True)[:LINES]]
        for patch in strongest.tolist():
            other = int(nearest_1N[0, patch])
            x = [(patch % cells + 0.5) * 14, side + (other % cells + 0.5) * 14]
            y = [(patch // cells + 0.5) * 14, (other // cells + 0.5) * 14]
            right.plot(x, y, linewidth=0.6, color="#39d6ff", marker="o", markersize=1.5, alpha=0.8)
        is_right = number in benchmark.positives(query)
        verdict = "the place" if is_right else "another place"
        shown = f", {len(strongest)} drawn" if len(strongest) < len(matched) else ""
        right.set_title(f"{len(matched)} matches{shown}: {verdict}", fontsize=8, color=RIGHT if is_right else WRONG)
        for axis in (left, right):
            axis.set_axis_off()
    figure.suptitle(f"{benchmark.name}: what re-ranking sees", fontsize=10)
    figure.savefig(path, dpi=110)
    model.train(was_training)
    return path
