"""The ablation: rows that exist and validate, statistics against plain numbers, a page from what is finished."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import ablation
from benchmarks.ablation import Options, Run, Work, _hits
from benchmarks.ablation_page import fitted_decay, interval, write_page
from benchmarks.ablation_rows import BASE, PLANS
from configs.flags import parse_flags
from configs.load import load_recipe
from configs.schema import Recipe
from launch.eval_command import EvalCommand


@pytest.mark.parametrize("name", PLANS)
def test_every_row_is_a_recipe_and_flags_that_exist(name: str) -> None:
    plan = PLANS[name]
    assert len({row.name for row in plan.rows}) == len(plan.rows)
    trainings = {**plan.trainings, **{f"{rate}": {**plan.drift, "optim.lr": rate} for rate in plan.learning_rates}}
    seen = []
    for changes in trainings.values():
        content = load_recipe(Path(plan.recipe)).model_dump(mode="json")
        for key, value in {**plan.base, **changes}.items():
            section, _, field = key.partition(".")
            assert field in content[section], key
            content[section][field] = value
        seen.append(Recipe.model_validate(content))
    assert len(set(map(str, seen))) == len(seen)
    for row in plan.rows:
        assert row.training in plan.trainings
        assert row.evaluation in plan.evaluations
        assert plan.row(row.against)
    for changes in plan.evaluations.values():
        flags = [text for key, value in changes.items() for text in ablation._flag(key, value)]
        parse_flags(EvalCommand, ["--benchmarks", *plan.benchmarks, *flags], prog="eval")
    with pytest.raises(ValueError, match="no row 'nothing'; rows are base"):
        plan.row("nothing")


def test_intervals_draw_seeds_and_query_images() -> None:
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(200), 2)
    alone = interval((rng.random((1, 400)) < 0.3).astype(float), np.arange(400))
    assert alone.value == pytest.approx(30, abs=7)
    width = 2 * 1.96 * 100 * math.sqrt(0.3 * 0.7 / 400)
    assert alone.high - alone.low == pytest.approx(width, rel=0.15)
    pairs = interval(np.repeat((rng.random((1, 200)) < 0.3).astype(float), 2, axis=1), units)
    assert pairs.high - pairs.low == pytest.approx(width * math.sqrt(2), rel=0.15)  # 200 images, not 400 queries
    seeds = interval(np.repeat(np.array([[0.0], [1.0], [1.0], [0.0]]), 400, axis=1), units)
    assert (seeds.value, seeds.low, seeds.high, seeds.seeds) == (50, 0, 100, 4)
    same = np.repeat((rng.random((1, 400)) < 0.5).astype(float), 3, axis=0)
    nothing = interval(same - same, units)
    assert (nothing.value, nothing.low, nothing.high, nothing.is_told) == (0, 0, 0, False)


def test_the_decay_that_fits_is_that_of_an_exponential() -> None:
    assert fitted_decay({age: math.exp(-0.05 * age) for age in (2, 10, 40)}) == pytest.approx(0.1)
    assert fitted_decay({5: 1.0}) == 0


def test_hits_are_read_query_by_query(tmp_path: Path) -> None:
    rows = [
        {"benchmark": "a", "stage": stage, "query": query, "rank": rank, "positive": positive}
        for stage, query, rank, positive in (
            ("retrieved", "q1", 1, False),
            ("retrieved", "q1", 2, True),
            ("retrieved", "q1", 6, True),
            ("re-ranked", "q1", 1, True),
            ("retrieved", "q0", 1, False),
            ("re-ranked", "q0", 7, True),
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "predictions.parquet")
    found = _hits(tmp_path / "predictions.parquet")
    assert found["queries"] == [["a", "q0"], ["a", "q1"]]
    assert found["retrieved"] == {"1": [0, 0], "5": [0, 1], "10": [0, 1]}
    assert found["re-ranked"] == {"1": [0, 1], "5": [0, 1], "10": [1, 1]}


def finished(training: str, evaluation: str, seed: int, share: float) -> dict[str, Any]:
    hits = (np.random.default_rng(seed).random(60) < share).astype(int).tolist()
    by_k = {str(k): hits for k in (1, 5, 10)}
    queries = [["town", f"q{i:02}"] for i in range(60)]
    return {
        **{"set": "town", "steps": 5, "seed": seed, "training": training, "evaluation": evaluation, "machine": "m"},
        **{"hits": {"queries": queries, "retrieved": by_k, "re-ranked": by_k}, "depth": [10.0], "settings": {}},
        **{"seconds_training": 3.0, "seconds_evaluation": 1.0},
    }


def test_the_page_says_what_is_finished_and_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "town-5-steps"
    folder.mkdir(parents=True)
    runs = [finished(BASE, BASE, seed, 0.5) for seed in range(3)] + [finished("no-queue", BASE, 1, 0.9)]
    for number, run in enumerate(runs):
        (folder / f"{number}.json").write_text(json.dumps(run))
    drift = {"curves": {"4": {"2": 0.9}}, "lr": 1e-3, "evaluation": "drift", "training": "drift-0.001"}
    (folder / "drift.json").write_text(json.dumps(finished(BASE, BASE, 0, 0.5) | drift))
    figures = write_page(tmp_path / "page.md", tmp_path / "out")
    text = (tmp_path / "page.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| `no-queue`")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "1"
    first, other = (np.random.default_rng(1).random(60) < share for share in (0.5, 0.9))
    gain = 100 * (other.mean() - first.mean())  # seed 1 alone is in both rows
    assert cells[5].startswith(f"**{gain:+.1f}")
    assert figures["town_5_no-queue_retrieved_gain"] == pytest.approx(gain)
    assert "- Not run: decay-0, " in text
    assert "| 0.001 | 1 | 0.900 | 0.1054 | 6.6 |" in text


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(set="town", rows=("no-queue",), seeds=2, steps=5, out=tmp_path, page=tmp_path / "page.md")
    monkeypatch.setattr(Work, "_prepare", lambda self: load_recipe(Path("demo")))
    did: list[Run] = []

    def train(self: Work, run: Run, changes: dict[str, Any]) -> None:
        did.append(run)
        about = self._about(run, changes, BASE)
        self._file_of(run, BASE).parent.mkdir(parents=True, exist_ok=True)
        self._file_of(run, BASE).write_text(json.dumps(finished(run.training, BASE, run.seed, 0.5) | about))
        if len(did) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "_train_and_evaluate", train)
    with pytest.raises(KeyboardInterrupt):
        Work(options, PLANS["town"]).rows()
    assert [(run.training, run.seed) for run in did] == [(BASE, 0), ("no-queue", 0), (BASE, 1)]
    assert Work(options, PLANS["town"]).rows() == []
    assert [(run.training, run.seed) for run in did[3:]] == [("no-queue", 1)]
