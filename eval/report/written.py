"""`report.html` of an evaluation that has just been made: what is on disk, and maps and matches besides."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.files import write_whole
from configs.schema import EvalConfig
from data_pipeline.positions import Positions
from eval.benchmarks.benchmark import Benchmark
from eval.describer import Describer
from eval.report.charts import map_chart
from eval.report.figures import short_name
from eval.report.match_pictures import Pair, draw_pairs
from eval.report.page import Extras, report_page
from eval.report.predictions import RERANKED, RETRIEVED
from eval.report.stored import Evaluation, Found, found_in
from eval.result import Result
from model.network import PlaceModel

CHANGED, UNCHANGED = 4, 2  # queries whose matches are drawn: of each kind that re-ranking changed, and wrong ones


def write_report(
    path: Path,
    model: PlaceModel,
    benchmarks: Sequence[Benchmark],
    results: Sequence[Result],
    predictions: Sequence[pa.Table],
    config: EvalConfig,
    *,
    name: str,
    facts: Mapping[str, str],
    curves: Sequence[str] = (),
) -> None:
    """Writes the page, whole or not at all. `predictions` are the benchmarks' tables, `facts` how it was made."""
    found = {name: one for table in predictions for name, one in found_in(table).items()}
    evaluation = Evaluation(
        path.parent.name or str(path.parent), name, {one.name: one.as_dict() for one in results}, found, dict(facts)
    )
    was_training = model.training
    describer = Describer(model, config)
    extras = {
        benchmark.name: Extras(
            map=_map(benchmark, result),
            pairs=draw_pairs(describer, _pairs(found[benchmark.name])) if config.rerank.enabled else (),
            sweep=_sweep(path.parent / "sweeps" / f"{benchmark.name}.png"),
        )
        for benchmark, result in zip(benchmarks, results, strict=True)
    }
    model.train(was_training)
    write_whole(path, report_page([evaluation], extras=extras, curves=curves))


def _pairs(found: Found) -> list[Pair]:
    """Queries that re-ranking changed, each with its first candidate before and after; and some that stay wrong."""
    if RERANKED not in found.stages:
        return []
    pairs = []
    for outcome, most in (("rescued", CHANGED), ("harmed", CHANGED), ("wrong", UNCHANGED)):
        queries = [query for query in found.queries if found.outcome[query] == outcome][:most]
        for query in queries:
            for stage in (RETRIEVED, RERANKED):
                first = found.stages[stage][query][0]
                verdict = "right" if first.is_right else "wrong"
                caption = f"{short_name(Path(query))}, {outcome}. First {stage}: {verdict}"
                pairs.append(Pair(found.root / query, found.root / first.image, caption))
    return pairs


def _map(benchmark: Benchmark, result: Result) -> str:
    if benchmark.at is None:
        return ""
    database_D2, queries_Q2 = _metres(benchmark.at.database, benchmark.at.queries)
    final_QK = result.predictions_QK if result.reranked_QK is None else result.reranked_QK
    first_Q = final_QK[:, 0]
    is_right = np.array([bool(np.isin(first, benchmark.positives(q))) for q, first in enumerate(first_Q)])
    wrong = ~is_right & benchmark.is_labelled_Q & (first_Q >= 0)
    links_L4 = np.concatenate([queries_Q2[wrong], database_D2[first_Q[wrong]]], axis=1)
    points = {"database": database_D2, "queries, right": queries_Q2[is_right], "queries, wrong": queries_Q2[wrong]}
    return map_chart(points, links_L4, title="Where? Lines lead from a wrong query to its first candidate")


def _metres(database: Positions, queries: Positions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """East and north of each image in the zone of most database images; NaN for the others."""
    zones, counts = np.unique(database.zone[database.known], return_counts=True)
    zone = zones[counts.argmax()] if len(zones) else 0
    database_D2, queries_Q2 = (np.stack([part.east, part.north], axis=1) for part in (database, queries))
    database_D2[database.zone != zone], queries_Q2[queries.zone != zone] = np.nan, np.nan
    return database_D2, queries_Q2


def _sweep(picture: Path) -> str:
    if not picture.is_file():
        return ""
    text = base64.b64encode(picture.read_bytes()).decode()
    said = escape(f"recall over both thresholds, {picture.stem}")
    image = f'<img style="max-width:100%" src="data:image/png;base64,{text}" alt="{said}">'
    return f'<figure class="chart"><figcaption>{said}</figcaption>{image}</figure>'
