"""Tables, `results.json` and `results.csv` of an evaluation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from configs.files import write_whole
from configs.image_size import shown_size
from eval.recall import Recall
from eval.result import Result

SETTINGS = ("top_k", "saliency_thresh", "nn_match_thresh")  # of the re-ranking, columns of their own


def results_title(result: Result) -> Text:
    """What a table of results is about: the benchmark, what was read of it, how it was re-ranked."""
    counts = f"{result.num_queries} queries in {result.num_database} images"
    if result.num_labelled:
        counts = f"{counts}, {result.num_labelled} with ground truth"
    rule = f"re-ranked: {result.rerank_rule}" if result.rerank_rule else ""
    about = f"{counts}; {result.protocol}; {result.layout}; {result.pixels}, {result.precision}"
    unit = "recall in %, 95 % intervals over queries" if result.retrieved else "predictions, without recall"
    title = Text("\n".join(filter(None, (result.name, about, rule, unit))))
    title.stylize("bold", 0, len(result.name))
    return title


def results_table(result: Result) -> Table:
    """A row per stage of a benchmark, with intervals and cost."""
    table = Table()
    table.add_column("stage", no_wrap=True)
    ks = list(result.retrieved.by_k)
    for k in ks:
        table.add_column(f"R@{k}", justify="right", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    none = ["-"] * len(ks)
    ms = {name: f"{1000 * seconds:.2f} ms" for name, seconds in result.timings.items()}
    speed = f"{result.images_per_s:,.0f} images/s"
    cost = f"{ms['extraction_s_per_image']}/image\n{speed}\n{ms['retrieval_s_per_query']}/query"
    label = "retrieved"
    if result.index_agreement is not None:
        label += f"\n{result.index}:\n{result.index_agreement:.1f} % of\nthe exact"
    table.add_row(label, *(_cells(result.retrieved) or none), cost)
    if result.reranked is not None:
        label = "re-ranked"
        if result.num_left_alone:
            label += f"\n({result.num_left_alone} left alone)"
        if result.matches_QT is not None and result.mean_depth < result.matches_QT.shape[1]:
            label += f"\n({result.mean_depth:.1f} matched each)"
        cost = f"{ms['rerank_s_per_query']}/query\n{result.mb_per_image:.3f} MB/image"
        table.add_row(label, *(_cells(result.reranked) or none), cost)
        if result.gain:
            table.add_row("gain, paired", *_cells(result.gain, "+.1f"), "")
    return table


def _cells(recall: Recall, form: str = ".1f") -> list[str]:
    cells = []
    for figure in recall.by_k.values():
        bounds = "..".join(f"{bound:{form}}" for bound in figure.interval or ())
        cells.append(f"{figure.value:{form}}" + (f"\n{bounds}" if bounds else ""))
    return cells


def write_results(
    path: Path,
    results: list[Result],
    *,
    model: str,
    before: list[dict[str, Any]] | None = None,
    validations: dict[str, float] | None = None,
    made: dict[str, str] | None = None,
) -> None:
    """`results.json`: the model, and for each benchmark protocol, recall by K before and after re-rank, and timings.

    `before` holds results of the untrained model, `validations` the mean recall at the smallest K by step, `made` the
    command, versions and machine. The file appears whole or not at all.
    """
    content: dict[str, Any] = {"model": model, "results": [result.as_dict() for result in results]}
    if before is not None:
        content["before"] = before
    if validations:
        content["validations"] = validations
    if made:
        content["made"] = made
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))


def write_csv(path: Path, results: list[Result]) -> None:
    """`results.csv`: one row per benchmark, stage and K, with the interval; figures a table or a plot wants.

    A benchmark without ground truth has one row without stage, K and recall.
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    names = ("benchmark", "protocol", "queries", "database", "image_size", "precision")
    cost = ("s_per_image", "images_per_s")
    table.writerow([*names, "stage", "k", "recall", "low", "high", "labelled", *cost, *SETTINGS, "rerank"])
    for result in results:
        about = [
            result.name,
            result.protocol,
            result.num_queries,
            result.num_database,
            shown_size(result.image_size),
            result.precision,
        ]
        labelled = result.num_queries if result.num_labelled is None else result.num_labelled
        if not result.stages():
            table.writerow([*about, "", "", "", "", "", labelled, *_how(result, "")])
        for stage, recall in result.stages().items():
            for k, figure in recall.by_k.items():
                bounds = [f"{bound:.4f}" for bound in figure.interval or ()] or ["", ""]
                table.writerow([*about, stage, k, f"{figure.value:.4f}", *bounds, labelled, *_how(result, stage)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, out.getvalue())


def _how(result: Result, stage: str) -> list[Any]:
    """Seconds per image, images per second; of a stage after retrieval also its settings, of which None is all."""
    seconds = result.timings.get("extraction_s_per_image", 0.0)
    settings = result.rerank if result.rerank and stage in ("re-ranked", "gain") else {}
    rule = result.rerank_rule if settings else ""
    return [f"{seconds:.6f}", f"{result.images_per_s:.2f}", *(settings.get(name, "") for name in SETTINGS), rule]
