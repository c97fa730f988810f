"""An evaluation as it is on disk: `results.json` and `predictions.parquet` of one `--out` folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from configs.explain import explained
from configs.reading import read_regular, reading
from eval.report.predictions import RERANKED, RETRIEVED, SCHEMA

RESULTS, PREDICTIONS = "results.json", "predictions.parquet"
NAMES = ("benchmark", "stage", "query", "image")  # columns that every row has


@dataclass(frozen=True)
class Candidate:
    """One image that was found for a query."""

    image: str  # relative to the root
    score: float  # cosine of the descriptors; NaN where unknown
    matches: float  # match score; NaN where nothing was matched
    metres: float  # from the query; NaN where unknown
    is_right: bool | None  # None without ground truth


@dataclass(frozen=True)
class Found:
    """What each stage found of one benchmark: candidates by query, best first, queries in their order."""

    root: Path
    stages: dict[str, dict[str, list[Candidate]]]

    @property
    def queries(self) -> list[str]:
        """Names of the queries, relative to the root."""
        return list(self.stages[RETRIEVED])

    @property
    def final(self) -> dict[str, list[Candidate]]:
        """The last stage."""
        return self.stages.get(RERANKED, self.stages[RETRIEVED])

    @cached_property
    def outcome(self) -> dict[str, str]:
        """For each query: right, wrong, rescued or harmed by re-ranking, by its first candidate; or unlabelled."""
        return {query: _outcome(self.stages[RETRIEVED][query], self.final.get(query, [])) for query in self.queries}

    def hits(self, stage: str) -> NDArray[np.float64]:
        """Place (from 0) of the first right candidate of each labelled query, infinite where none is right."""
        return np.array(
            [
                next((place for place, one in enumerate(candidates) if one.is_right), np.inf)
                for candidates in self.stages[stage].values()
                if candidates[0].is_right is not None
            ]
        )


class Figures(BaseModel):
    """What pages read of the results of a benchmark; by K, which is text in JSON."""

    model_config = ConfigDict(strict=True)

    notes: list[str] = []
    recall: dict[str, float] | None = None
    recall_interval: dict[str, list[float]] | None = None
    recall_reranked: dict[str, float] | None = None
    reranked_interval: dict[str, list[float]] | None = None
    gain: dict[str, list[float]] | None = None
    timings: dict[str, float] | None = None
    mb_per_image: float = 0.0

    def check(self) -> None:
        """Raises ValueError for a K that is no number, and for gains without one."""
        for by_k in (self.recall, self.recall_interval, self.recall_reranked, self.reranked_interval, self.gain):
            list(map(int, by_k or ()))
        if not all((self.gain or {}).values()):
            raise ValueError("a gain of nothing")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the model's name, results by benchmark as `Result.as_dict` gives them, what was found."""

    name: str
    model: str
    results: dict[str, dict[str, Any]]
    found: dict[str, Found]
    facts: dict[str, str] = field(default_factory=dict)  # command, versions, machine


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation in a folder. Raises ValueError naming the file, or what writes it."""
    for name in (RESULTS, PREDICTIONS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; `rerankvpr eval ... --out {folder}` writes it")
    with reading(folder / RESULTS, "results of rerankvpr eval"):
        content = json.loads(read_regular(folder / RESULTS))
        results = {str(one["name"]): dict(one) for one in content["results"]}
        for one in results.values():
            with explained(Figures):
                Figures.model_validate(one).check()
        model = str(content["model"])
        facts = {str(key): str(value) for key, value in content.get("made", {}).items()}
    with reading(folder / PREDICTIONS, "predictions of rerankvpr eval"):
        table = pq.read_table(folder / PREDICTIONS)
        metadata = table.schema.metadata or {}
        if any(table[name].null_count for name in NAMES):
            raise ValueError(f"rows without {' or '.join(NAMES)}")
        found = found_in(table.select(SCHEMA.names).cast(SCHEMA).replace_schema_metadata(metadata))
    return Evaluation(str(folder), model, results, found, facts)


def found_in(table: pa.Table) -> dict[str, Found]:
    """What was found of each benchmark, from a table of predictions."""
    roots = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    found = {}
    for benchmark in pc.unique(table["benchmark"]).to_pylist():
        rows = table.filter(pc.equal(table["benchmark"], benchmark))
        stages: dict[str, dict[str, list[Candidate]]] = {}
        columns = [
            rows[name].to_pylist() for name in ("stage", "query", "image", "score", "matches", "metres", "positive")
        ]
        for stage, query, image, score, matches, metres, is_right in zip(*columns, strict=True):
            one = Candidate(image, _number(score), _number(matches), _number(metres), is_right)
            stages.setdefault(stage, {}).setdefault(query, []).append(one)
        if RETRIEVED not in stages:
            raise ValueError(f"benchmark {benchmark} has no rows of stage {RETRIEVED}")
        found[benchmark] = Found(Path(roots.get(f"root of {benchmark}", ".")), stages)
    return found


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _outcome(before: list[Candidate], after: list[Candidate]) -> str:
    if not after or after[0].is_right is None:
        return "unlabelled"
    if after[0].is_right:
        return "right" if before[0].is_right else "rescued"
    return "harmed" if before[0].is_right else "wrong"
