"""Tables, `results.json` and `results.csv` of an evaluation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.files import write_whole
from eval.evaluate import Result


def results_table(results: list[Result]) -> Table:
    """First stage and re-ranked, a row each, with intervals, protocol and cost."""
    table = Table(title="Recall in %, with 95 % intervals over queries", title_justify="left")
    table.add_column("benchmark, protocol", overflow="fold")
    table.add_column("stage")
    for k in results[0].recall:
        table.add_column(f"R@{k}", justify="right", no_wrap=True)
    table.add_column("cost", justify="right")
    for result in results:
        ms = {name: f"{1000 * seconds:.2f} ms" for name, seconds in result.timings.items()}
        counts = f"{result.num_queries} queries in {result.num_database}"
        what = f"{result.name}\n{result.protocol}, {result.precision}\n{counts}"
        cost = f"{ms['extraction_s_per_image']}/image\n{ms['retrieval_s_per_query']}/query"
        label = "retrieved"
        if result.index_agreement is not None:
            label += f"\n{result.index}: {result.index_agreement:.1f} %\nof the exact"
        cells = _cells(result.recall, result.recall_interval)
        table.add_row(what, label, *cells, cost)
        if result.recall_reranked:
            label = "re-ranked"
            if result.num_left_alone:
                label += f"\n({result.num_left_alone} left alone)"
            cost = f"{ms['rerank_s_per_query']}/query\n{result.mb_per_image:.3f} MB/image"
            table.add_row("", label, *_cells(result.recall_reranked, result.reranked_interval), cost)
            if result.gain:
                gains = (f"{gain:+.1f}\n{low:+.1f}..{high:+.1f}" for gain, low, high in result.gain.values())
                table.add_row("", "gain, paired", *gains, "")
        table.add_section()
    return table


def _cells(recall: dict[int, float], interval: dict[int, tuple[float, float]]) -> list[str]:
    bounds = {k: f"\n{low:.1f}..{high:.1f}" for k, (low, high) in interval.items()}
    return [f"{value:.1f}{bounds.get(k, '')}" for k, value in recall.items()]


def write_results(path: Path, results: list[Result], *, model: str, before: list[dict[str, Any]] | None = None) -> None:
    """`results.json`: the model, and for each benchmark protocol, recall by K before and after re-rank, and timings.

    `before` holds results of the untrained model. The file appears whole or not at all.
    """
    content: dict[str, Any] = {"model": model, "results": [result.as_dict() for result in results]}
    if before is not None:
        content["before"] = before
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))


def write_csv(path: Path, results: list[Result]) -> None:
    """`results.csv`: a row a benchmark, stage and K, with the interval; figures a table or a plot wants."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    names = ("benchmark", "protocol", "queries", "database", "image_size", "precision")
    table.writerow([*names, "stage", "k", "recall", "low", "high"])
    for result in results:
        about = [
            result.name,
            result.protocol,
            result.num_queries,
            result.num_database,
            result.image_size,
            result.precision,
        ]
        for stage, recall, interval in (
            ("retrieved", result.recall, result.recall_interval),
            ("re-ranked", result.recall_reranked or {}, result.reranked_interval),
            ("gain", {k: g[0] for k, g in result.gain.items()}, {k: g[1:] for k, g in result.gain.items()}),
        ):
            for k, value in recall.items():
                bounds = [f"{x:.4f}" for x in interval[k]] if interval else ["", ""]
                table.writerow([*about, stage, k, f"{value:.4f}", *bounds])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, out.getvalue())
