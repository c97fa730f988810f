"""An evaluation, or several side by side, as one HTML page that holds all that it shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from eval.report.charts import line_chart
from eval.report.figures import short_name
from eval.report.page_style import SCRIPT, STYLE
from eval.report.page_tables import comparison_table, results_table
from eval.report.predictions import RERANKED, RETRIEVED
from eval.report.stored import Candidate, Evaluation, Found
from eval.report.thumbnails import Thumbnails

PICTURE_BYTES = 6_000_000  # in base64; with all else a page stays below 10 MB
SHOWN = 5
ORDER = ("rescued", "harmed", "wrong", "unlabelled", "right")
MEANING = {
    "right": "right: the first candidate shows the place",
    "wrong": "wrong: it does not",
    "rescued": "rescued: right, and wrong before re-ranking",
    "harmed": "harmed: wrong, and right before re-ranking",
    "unlabelled": "without ground truth",
}


@dataclass(frozen=True)
class Extras:
    """What belongs to a benchmark beyond the files of an evaluation: HTML of its map, matches and sweep."""

    map: str = ""
    pairs: Sequence[str] = field(default=())
    sweep: str = ""


def report_page(
    evaluations: Sequence[Evaluation],
    *,
    extras: Mapping[str, Extras] | None = None,
    curves: Sequence[str] = (),
    most_queries: int = 150,
) -> str:
    """The page: tables, curves, queries with what was found for them, `most_queries` of each benchmark at most.

    With several evaluations the pictures are of the first, and of the queries at whose first candidate they differ.
    """
    extras = extras or {}
    first = evaluations[0]
    thumbs = Thumbnails(PICTURE_BYTES)
    several = len(evaluations) > 1
    title = " and ".join(one.name for one in evaluations) if several else first.name
    parts = [f"<h1>Place recognition: {escape(title)}</h1>", _navigation(evaluations, curves), _models(evaluations)]
    parts.append('<h2 id="results">Results</h2>' + results_table(evaluations))
    if several:
        parts.append('<h2 id="comparison">Which one is better?</h2>' + comparison_table(evaluations))
    if curves:
        parts.append('<h2 id="training">Training</h2><div class="charts">' + "".join(curves) + "</div>")
    for name, found in first.found.items():
        others = {one.name: one.found[name] for one in evaluations[1:] if name in one.found}
        parts.append(_benchmark(name, found, others, extras.get(name, Extras()), first, thumbs, most_queries))
    parts.append(_facts(evaluations))
    if thumbs.unreadable:
        some = next(iter(thumbs.unreadable.values()))
        parts.append(f'<p class="note">{len(thumbs.unreadable)} pictures could not be read, such as {escape(some)}</p>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}"
        f'<script type="application/json" id="thumbs">{json.dumps(thumbs.pictures)}</script>'
        f"<script>{SCRIPT}</script></body></html>"
    )


def _navigation(evaluations: Sequence[Evaluation], curves: Sequence[str]) -> str:
    sections = {"results": "Results"}
    if len(evaluations) > 1:
        sections["comparison"] = "Comparison"
    if curves:
        sections["training"] = "Training"
    sections |= {_id(name): name for name in evaluations[0].found}
    sections["made"] = "How it was made"
    links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in sections.items())
    return f"<nav>{links}</nav>"


def _models(evaluations: Sequence[Evaluation]) -> str:
    return "".join(f"<p>{escape(one.name)}: model <code>{escape(one.model)}</code></p>" for one in evaluations)


def _benchmark(
    name: str,
    found: Found,
    others: Mapping[str, Found],
    extras: Extras,
    first: Evaluation,
    thumbs: Thumbnails,
    most_queries: int,
) -> str:
    result = first.results.get(name, {})
    notes = "".join(f'<p class="note">{escape(str(note))}</p>' for note in result.get("notes", ()))
    counts = Counter(found.outcome.values())
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ORDER if counts[outcome])
    curves = _recall_curve(first.name, found, others) + _precision_curve(found) + extras.map + extras.sweep
    pairs = ""
    if extras.pairs:
        pairs = (
            "<h3>What re-ranking matched</h3><p class='small'>Query left, candidate right. Light: patches that are "
            "salient enough to match. Blue: matches that score; grey: those that agree on no common shift.</p>"
            f'<div class="pairs">{"".join(extras.pairs)}</div>'
        )
    chosen = choose_queries(found, others, most_queries)
    rows = []
    for query in chosen:
        if thumbs.is_full:
            break
        rows.append(_query(query, first.name if others else "", found, others, thumbs))
    shown = "" if len(rows) == len(found.queries) else f"{len(rows)} of {len(found.queries)} queries are shown. "
    first_of_all = "on which the evaluations differ" if others else "that re-ranking changed"
    shown += f"First are those {first_of_all}, then wrong ones."
    return (
        f'<h2 id="{_id(name)}">{escape(name)}</h2><p>{escape(str(result.get("protocol", "")))}. '
        f"{len(found.queries)} queries: {said}. {shown}</p>{notes}"
        f'<div class="charts">{curves}</div>{pairs}{_filter(name, counts, bool(others))}'
        f'<div id="rows-{_id(name)}">{"".join(rows)}</div>'
    )


def choose_queries(found: Found, others: Mapping[str, Found], most: int) -> list[str]:
    """At most `most` queries: those that evaluations differ on first, then by what re-ranking did, right ones last."""
    outcome = found.outcome
    differ = {
        query for query in found.queries if any(one.outcome.get(query) != outcome[query] for one in others.values())
    }
    return sorted(found.queries, key=lambda query: (query not in differ, ORDER.index(outcome[query])))[:most]


def _filter(name: str, counts: Counter[str], several: bool) -> str:
    kinds = ["all", *(outcome for outcome in ORDER if counts[outcome])] + (["differs"] if several else [])
    group = f"filter-{_id(name)}"
    radios = "".join(
        f'<label title="{escape(MEANING.get(kind, ""))}"><input type="radio" name="{group}" value="{kind}"'
        f"{' checked' if kind == 'all' else ''}> {kind}</label>"
        for kind in kinds
    )
    return (
        f'<fieldset data-filter="rows-{_id(name)}"><legend>Show queries</legend>{radios}'
        '<output class="small" aria-live="polite"></output></fieldset>'
    )


def _query(query: str, name: str, found: Found, others: Mapping[str, Found], thumbs: Thumbnails) -> str:
    outcome = found.outcome[query]
    differs = any(one.outcome.get(query) != outcome for one in others.values())
    strips = [_strip("query", [_picture(found.root / query, query, "", thumbs)])]
    labels = {stage: f"{name}, {stage}" if name else stage for stage in (RETRIEVED, RERANKED)}
    for stage, label in labels.items():
        if query in found.stages.get(stage, {}):
            strips.append(_candidates(label, found.stages[stage][query], found.root, thumbs))
    for one, other in others.items():
        if query in other.final:
            stage = RERANKED if RERANKED in other.stages else RETRIEVED
            strips.append(_candidates(f"{one}, {stage}", other.final[query], other.root, thumbs))
    kinds = f"{outcome} differs" if differs else outcome
    return (
        f'<article class="query" data-outcome="{kinds}"><h3 title="{escape(query)}">{outcome}: '
        f'<span class="small">{escape(short_name(Path(query)))}</span></h3>'
        f'<div class="strips">{"".join(strips)}</div></article>'
    )


def _candidates(label: str, candidates: Sequence[Candidate], root: Path, thumbs: Thumbnails) -> str:
    figures = []
    for place, one in enumerate(candidates[:SHOWN], start=1):
        mark = {True: "✓ right", False: "✗ wrong", None: ""}[one.is_right]
        kind = {True: "yes", False: "no", None: ""}[one.is_right]
        numbers = [f"cosine {one.score:.2f}"] if np.isfinite(one.score) else []
        numbers += [f"{one.matches:.0f} matches"] if np.isfinite(one.matches) else []
        numbers += [f"{_distance(one.metres)} away"] if np.isfinite(one.metres) else []
        caption = "<br>".join([f'{place}. <span class="mark">{mark}</span>', *numbers])
        figures.append(_picture(root / one.image, f"candidate {place}: {one.image}, {mark}", caption, thumbs, kind))
    return _strip(label, figures)


def _distance(metres: float) -> str:
    return f"{metres / 1000:,.1f} km" if metres >= 1000 else f"{metres:.0f} m"


def _strip(label: str, figures: Sequence[str]) -> str:
    return f'<div class="strip"><b>{escape(label)}</b>{"".join(figures)}</div>'


def _picture(path: Path, text: str, caption: str, thumbs: Thumbnails, kind: str = "") -> str:
    number = thumbs.number_of(path)
    image = f'<img data-thumb="{number}" alt="{escape(text)}">' if number is not None else "<p>no picture</p>"
    return f'<figure class="{kind}" title="{escape(text)}">{image}<figcaption>{caption}</figcaption></figure>'


def _recall_curve(name: str, found: Found, others: Mapping[str, Found]) -> str:
    lines = {}
    for label, one in ((name, found), *others.items()):
        for stage in one.stages:
            hits = one.hits(stage)
            if len(hits):
                ks = range(1, max(map(len, one.stages[stage].values())) + 1)
                what = f"{label}, {stage}" if others else stage
                lines[what] = (list(ks), [100 * float((hits < k).mean()) for k in ks])
    return line_chart(lines, title="Recall by the number of candidates", x="K", y="recall@K in %", y_range=(0, 100))


def _precision_curve(found: Found) -> str:
    """Precision against recall as the threshold on the first candidate's score falls."""
    lines = {}
    for stage, by_query in found.stages.items():
        heads = [candidates[0] for candidates in by_query.values() if candidates[0].is_right is not None]
        use_matches = stage == RERANKED and all(np.isfinite(head.matches) for head in heads)
        scores = np.array([head.matches if use_matches else head.score for head in heads])
        if len(heads) < 2 or not np.isfinite(scores).all():
            continue
        right = np.array([bool(head.is_right) for head in heads])[np.argsort(-scores, kind="stable")]
        answered = np.arange(1, len(right) + 1)
        label = f"{stage}, by {'matches' if use_matches else 'similarity'}"
        lines[label] = (100 * np.cumsum(right) / len(right), 100 * np.cumsum(right) / answered)
    as_lists = {label: (xs.tolist(), ys.tolist()) for label, (xs, ys) in lines.items()}
    return line_chart(
        as_lists,
        title="Precision of the first candidate",
        x="queries answered right, %",
        y="precision in %",
        x_range=(0, 100),
        y_range=(0, 100),
    )


def _facts(evaluations: Sequence[Evaluation]) -> str:
    rows = []
    for one in evaluations:
        whose = f"<td>{escape(one.name)}</td>" if len(evaluations) > 1 else ""
        rows += [f"<tr>{whose}<td>{escape(key)}</td><td>{_link(value)}</td></tr>" for key, value in one.facts.items()]
    if not rows:
        return ""
    return f'<h2 id="made">How was it made?</h2><div class="scroll"><table class="made">{"".join(rows)}</table></div>'


def _link(value: str) -> str:
    """A value of a fact, to be followed if it is an address."""
    shown = f"<code>{escape(value)}</code>"
    return f'<a href="{escape(value)}">{shown}</a>' if value.startswith(("http://", "https://")) else shown


def _id(name: str) -> str:
    return "b-" + re.sub(r"[^A-Za-z0-9]+", "-", name)
