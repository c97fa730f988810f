"""The tables of a page: recalls of each stage with intervals and cost; evaluations against each other, paired."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from eval.recall import bootstrap_means
from eval.report.stored import Evaluation

RESAMPLES = 2000


def results_table(evaluations: Sequence[Evaluation]) -> str:
    """A group of rows per evaluation and benchmark, a row per stage: recall@K with 95 % intervals, and what it costs.

    What a group is about stands above it, so that its figures are in sight on a phone.
    """
    ks = sorted({int(k) for one in evaluations for result in one.results.values() for k in result.get("recall") or {}})
    heads = "".join(f'<th scope="col" class="number">R@{k}, %</th>' for k in ks)
    groups = []
    for one in evaluations:
        for name, result in one.results.items():
            about = [str(result.get(key, "")) for key in ("protocol", "layout", "pixels", "precision")]
            about += [f"re-ranked: {rule}" for rule in [result.get("rerank_rule")] if rule]
            counts = f"{result.get('num_queries', '?')} queries in {result.get('num_database', '?')} images"
            told = "; ".join(map(escape, filter(None, [one.name, *about, counts])))
            what = (
                f'<tr><th scope="rowgroup" colspan="{len(ks) + 1}"><div class="about">{escape(name)}<br>'
                f'<span class="small">{told}</span></div></th></tr>'
            )
            rows = "".join(_stages(result, ks))
            groups.append(f"<tbody>{what}{rows}</tbody>")
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th scope="col">stage</th>{heads}</tr></thead>'
        f"{''.join(groups)}</table></div>"
    )


def _stages(result: dict[str, Any], ks: Sequence[int]) -> list[str]:
    timings = result.get("timings") or {}
    extraction = _rate("encoding", timings.get("extraction_s_per_image"), "image")
    search = _rate("search", timings.get("retrieval_s_per_query"), "query")
    rows = [_row("retrieved", result.get("recall"), result.get("recall_interval"), ks, [extraction, search])]
    if result.get("recall_reranked"):
        stored = f"{1000 * float(result.get('mb_per_image', 0)):.0f} kB stored per image"
        cost = [_rate("matching", timings.get("rerank_s_per_query"), "query"), stored]
        rows.append(_row("re-ranked", result["recall_reranked"], result.get("reranked_interval"), ks, cost))
        gain = {str(k): v for k, v in (result.get("gain") or {}).items()}
        if gain:
            values = {k: v[0] for k, v in gain.items()}
            rows.append(_row("gain, paired", values, {k: v[1:] for k, v in gain.items()}, ks, [], sign="+"))
    return rows


def _row(stage: str, values: Any, intervals: Any, ks: Sequence[int], cost: Sequence[str], sign: str = "") -> str:
    """A stage's recalls, and below them what it costs: a column of it would be out of sight on a phone."""
    by_k = {int(k): float(v) for k, v in (values or {}).items()}
    bounds = {int(k): v for k, v in (intervals or {}).items()}
    cells = []
    for k in ks:
        interval = bounds.get(k) or ()
        small = f'<br><span class="small">{" to ".join(f"{b:{sign}.1f}" for b in interval)}</span>' if interval else ""
        cells.append(f'<td class="number">{f"{by_k[k]:{sign}.1f}" if k in by_k else "-"}{small}</td>')
    row = f'<tr><th scope="row">{stage}</th>{"".join(cells)}</tr>'
    told = "; ".join(filter(None, cost))
    return row + (f'<tr class="cost"><td colspan="{len(ks) + 1}" class="small">{told}</td></tr>' if told else "")


def _rate(what: str, seconds: Any, of: str) -> str:
    if not seconds:
        return ""
    many = {"image": "images", "query": "queries"}[of]
    return f"{what} {1000 * float(seconds):.2f} ms per {of} ({1 / float(seconds):,.0f} {many}/s)"


def comparison_table(evaluations: Sequence[Evaluation]) -> str:
    """The first evaluation against each other one: R@1 of the last stage, paired over the queries that both have.

    The benchmark stands above its rows, so that their figures are in sight on a phone.
    """
    first, others = evaluations[0], evaluations[1:]
    heads = ("R@1, %", f"difference to {escape(first.name)}", "won, lost")
    groups = []
    for name in first.found:
        rows = "".join(_compared(name, first, other) for other in others)
        about = f'<th scope="rowgroup" colspan="4"><div class="about">{escape(name)}</div></th>'
        groups.append(f"<tbody><tr>{about}</tr>{rows}</tbody>")
    columns = "".join(f'<th scope="col" class="number">{head}</th>' for head in heads)
    return (
        '<p class="small">R@1 after the last stage, over the queries that both have. Won: right here, and wrong in '
        f"{escape(first.name)}; lost: the reverse. Intervals: 95 %, paired.</p>"
        f'<div class="scroll"><table class="results"><thead><tr><th scope="col">evaluation</th>{columns}</tr></thead>'
        f"{''.join(groups)}</table></div>"
    )


def _compared(name: str, first: Evaluation, other: Evaluation) -> str:
    """A row for each of the two."""
    if name not in other.found:
        return f'<tr><th scope="row">{escape(other.name)}</th><td colspan="3">not there</td></tr>'
    mine, theirs = first.found[name].outcome, other.found[name].outcome
    both = [query for query in mine if query in theirs and "unlabelled" not in (mine[query], theirs[query])]
    if not both:
        about = f'<th scope="row">{escape(other.name)}</th>'
        return f'<tr>{about}<td colspan="3">no query with ground truth in both</td></tr>'
    ok = np.array([[one[query] in ("right", "rescued") for query in both] for one in (mine, theirs)])
    gain = 100.0 * (ok[1].astype(float) - ok[0])
    low, high = bootstrap_means(gain, RESAMPLES)
    won, lost = int((ok[1] & ~ok[0]).sum()), int((ok[0] & ~ok[1]).sum())
    rows = (
        (first.name, f"{100 * ok[0].mean():.1f}", "", f"of {len(both)} queries"),
        (
            other.name,
            f"{100 * ok[1].mean():.1f}",
            f'{gain.mean():+.1f}<br><span class="small">{low:+.1f} to {high:+.1f}</span>',
            f"{won} won, {lost} lost",
        ),
    )
    cells = ("".join(f"<td class=number>{number}</td>" for number in numbers) for _, *numbers in rows)
    return "".join(f'<tr><th scope="row">{escape(row[0])}</th>{of}</tr>' for row, of in zip(rows, cells, strict=True))
