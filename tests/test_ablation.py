"""The ablation: rows that exist and validate, statistics against plain numbers, runs side by side, a page of them."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ablation, ablation_runs
from benchmarks.ablation import Options, Work
from benchmarks.ablation_page import IN_SHORT, fitted_decay, interval, write_page
from benchmarks.ablation_rows import BASE, PLANS
from benchmarks.ablation_runs import Job, changed, hits
from benchmarks.ablation_views import write_without_held_out
from configs.load import load_recipe
from configs.schema import EvalConfig, Recipe
from data_pipeline.sources.gsv_cities import read_gsv_cities
from eval.benchmarks.benchmark import make_benchmark
from eval.benchmarks.load import load_benchmarks
from eval.recall import Recall
from eval.result import Result
from tests import training
from tests.photos import write_gsv_cities


@pytest.mark.parametrize("name", PLANS)
def test_every_row_is_a_recipe_and_settings_that_exist(name: str) -> None:
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
        if seen[-1].data.hard_share:
            assert not seen[-1].data.repeat  # which the shard set would refuse
    assert len(set(map(str, seen))) == len(seen)
    for row in plan.rows:
        assert row.training in plan.trainings
        assert row.evaluation in plan.evaluations
        assert plan.row(row.against)
    for changes in plan.evaluations.values():
        settings = changed(EvalConfig(), changes).model_dump()
        for key, value in changes.items():
            section, _, field = key.rpartition(".")
            assert (settings[section] if section else settings)[field] == value
    with pytest.raises(ValueError, match="no row 'nothing'; rows are base"):
        plan.row("nothing")


def test_an_interval_of_one_seed_is_that_of_query_images() -> None:
    rng = np.random.default_rng(0)
    alone = interval((rng.random((1, 400)) < 0.3).astype(float), np.arange(400))
    assert alone.value == pytest.approx(30, abs=7)
    width = 2 * 1.96 * 100 * math.sqrt(0.3 * 0.7 / 400)
    assert alone.high - alone.low == pytest.approx(width, rel=0.1)
    pairs = interval(np.repeat((rng.random((1, 200)) < 0.3).astype(float), 2, axis=1), np.repeat(np.arange(200), 2))
    assert pairs.high - pairs.low == pytest.approx(width * math.sqrt(2), rel=0.1)  # 200 images, not 400 queries


def test_an_interval_of_seeds_is_students() -> None:
    seeds = interval(np.repeat(np.array([[0.4], [0.5], [0.6]]), 400, axis=1), np.arange(400))
    assert seeds.value == pytest.approx(50)
    assert seeds.high - seeds.value == pytest.approx(100 * 4.3027 * 0.1 / math.sqrt(3), rel=1e-4)  # t of 2, 0.975
    same = np.repeat((np.random.default_rng(1).random((1, 400)) < 0.5).astype(float), 3, axis=0)
    nothing = interval(same - same, np.arange(400))
    assert (nothing.value, nothing.low, nothing.high, nothing.is_told) == (0, 0, 0, False)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_nineteen_of_twenty_intervals_hold_the_truth(seeds: int) -> None:
    """Differences whose truth is 0, from seeds and queries that both vary; a bootstrap of three seeds holds 3 in 4."""
    rng, held, number = np.random.default_rng(seeds), 0, 600
    for _ in range(number):
        hits_SQ = 0.05 * rng.standard_normal((seeds, 1)) + 0.3 * rng.standard_normal((seeds, 80))
        hits_SQ += 0.2 * rng.standard_normal(80)
        found = interval(hits_SQ, np.arange(80))
        held += not found.is_told
    assert 0.92 * number < held <= number


def test_the_decay_that_fits_is_that_of_an_exponential() -> None:
    assert fitted_decay({age: math.exp(-0.05 * age) for age in (2, 10, 40)}) == pytest.approx(0.1)
    assert fitted_decay({5: 1.0}) == 0


def test_hits_are_read_query_by_query(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("d0.jpg", "d1.jpg", "d2.jpg", "q0.jpg", "q1.jpg")]
    benchmark = make_benchmark("a", "p", paths[:3], paths[3:], [np.array([2]), np.array([0, 1])])
    result = Result(
        **{"name": "a", "protocol": "p", "pixels": "", "num_database": 3, "num_queries": 2, "num_without_positive": 0},
        **{"image_size": 28, "precision": "fp32", "retrieved": Recall({}), "timings": {}},
        predictions_QK=np.array([[0, 1, 2], [2, 0, 1]]),
        reranked_QK=np.array([[2, 0, 1], [2, 1, 0]]),
    )
    found = hits([benchmark], [result])
    assert found["queries"] == [["a", "q0.jpg"], ["a", "q1.jpg"]]
    assert found["retrieved"] == {"1": [0, 0], "5": [1, 1], "10": [1, 1]}
    assert found["re-ranked"] == {"1": [1, 0], "5": [1, 1], "10": [1, 1]}


def test_held_out_views_are_queries_and_no_training_sees_them(tmp_path: Path) -> None:
    cities = {"Gardens": {0: 9}, "Tower": {0: 5, 1: 5}, "Facades": {3: 9, 4: 12}}
    write_gsv_cities(tmp_path / "source", cities)
    manifest = write_without_held_out(tmp_path / "source", tmp_path / "seen")
    seen = read_gsv_cities(tmp_path / "seen")
    (benchmark,) = load_benchmarks([f"manifest:{manifest}"], tmp_path)
    assert (len(benchmark.database), len(benchmark.queries)) == (4, 1 + 1 + 2 + 3)
    assert all(len(benchmark.positives(query)) == 1 for query in range(7))
    with manifest.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    trained = {str(tmp_path / "seen" / file) for file in seen.images["file"].to_pylist()}
    assert len(trained) == 9 + 8 + 7 + 9
    assert {row["path"] for row in rows if row["role"] == "database"} <= trained
    assert not {row["path"] for row in rows if row["role"] == "query"} & trained
    assert write_without_held_out(tmp_path / "nowhere", tmp_path / "seen") == manifest  # it is there


def finished(training: str, evaluation: str, seed: int, share: float) -> dict[str, Any]:
    found = (np.random.default_rng(seed).random(60) < share).astype(int).tolist()
    by_k = {str(k): found for k in (1, 5, 10)}
    queries = [["town", f"q{i:02}"] for i in range(60)]
    return {
        **{"set": "town", "steps": 5, "threads": 1, "at_once": 2, "seed": seed, "training": training},
        **{"evaluation": evaluation, "machine": "m", "settings": {}, "depth": [10.0]},
        **{"hits": {"queries": queries, "retrieved": by_k, "re-ranked": by_k}},
        **{"seconds_training": 3.0, "seconds_evaluation": 1.0},
        **{"processor_s_training": 3.0, "processor_s_evaluation": 1.0},
    }


def test_the_page_says_what_is_finished_and_no_more(tmp_path: Path) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "out" / "town-5-steps-1-threads"
    assert write_page(page, tmp_path / "out") == {}
    assert "No run is finished yet" in page.read_text()
    folder.mkdir(parents=True)
    runs = [finished(BASE, BASE, seed, 0.5) for seed in range(3)] + [finished("no-queue", BASE, 1, 0.9)]
    for number, run in enumerate(runs):
        (folder / f"{number}.json").write_text(json.dumps(run))
    drift = {"curves": {"4": {"2": 0.9}}, "lr": 1e-3, "evaluation": "drift", "training": "drift-0.001"}
    (folder / "drift.json").write_text(json.dumps(finished(BASE, BASE, 0, 0.5) | drift))
    page.write_text(f"# Old\n\n{IN_SHORT}\n\nSwitch it on.\n\n## town, 4 steps\n\nstale\n")
    figures = write_page(page, tmp_path / "out")
    text = page.read_text()
    assert f"\n\n{IN_SHORT}\n\nSwitch it on.\n\n## town, 5 steps\n" in text
    assert "stale" not in text
    assert "ran with 1 thread(s) on m." in text
    assert "--set town --steps 5 --at-once 2 --seeds 3 --rows base no-queue\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| `no-queue`")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "1"
    first, other = (np.random.default_rng(1).random(60) < share for share in (0.5, 0.9))
    gain = 100 * (other.mean() - first.mean())  # seed 1 alone is in both rows
    assert cells[5].startswith(f"{gain:+.1f}")  # of one seed nothing is in bold
    assert figures["town_5_no-queue_retrieved_gain"] == pytest.approx(gain)
    assert "- Not run: decay-0, " in text
    assert "| 0.001 | 1 | 0.900 | 0.1054 | 6.6 |" in text
    assert write_page(page, tmp_path / "out") == figures
    assert page.read_text() == text


def test_the_page_says_how_far_another_machine_is(tmp_path: Path) -> None:
    for place, machine, share in (("here", "m", 0.5), ("there", "n", 0.9)):
        folder = tmp_path / place / "town-5-steps-1-threads"
        folder.mkdir(parents=True)
        for seed in range(2):
            run = finished(BASE, BASE, seed, share if seed else 0.5) | {"machine": machine}
            (folder / f"{seed}.json").write_text(json.dumps(run))
    page = tmp_path / "page.md"
    figures = write_page(page, tmp_path / "here", tmp_path / "there")
    alike = np.random.default_rng(1).random(60)
    apart = 100 * ((alike < 0.9).mean() - (alike < 0.5).mean())
    assert figures["town_5_town_apart_retrieved_most"] == pytest.approx(apart)
    assert "2 of the trainings ran on n too, with 2 evaluations." in page.read_text()
    assert f"first stage {apart / 2:.1f} ({apart:.1f})" in page.read_text()
    write_page(page, tmp_path / "here", tmp_path / "here")
    assert "No run is there from another machine too." in page.read_text()


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "_prepared", lambda *_: load_recipe(Path("demo")))
    monkeypatch.setattr(ablation, "start_server", lambda *_: None)
    did: list[str] = []

    def run_jobs(jobs: list[Job], at_once: int) -> Iterator[tuple[Job, str]]:
        assert at_once == 2
        for job in jobs:
            did.append(job.name)
            if len(did) == 4:
                raise KeyboardInterrupt
            if len(did) == 2:
                yield job, "it broke"
                continue
            job.folder.mkdir(parents=True)
            of = {"hits": finished("", "", 0, 0.5)["hits"], "depth": [10.0], "seconds": 1.0, "processor_s": 1.0}
            content = {"seconds": 2.0, "processor_s": 2.0, "evaluations": {BASE: of}}
            (job.folder / ablation_runs.FOUND).write_text(json.dumps(content))
            yield job, ""

    monkeypatch.setattr(ablation, "run_jobs", run_jobs)
    options = Options(set="town", rows=("no-queue",), seeds=2, steps=5, out=tmp_path, page=tmp_path / "page.md")
    with pytest.raises(KeyboardInterrupt):
        Work(options, PLANS["town"]).rows()
    assert did == ["base, seed 0", "no-queue, seed 0", "base, seed 1", "no-queue, seed 1"]
    assert Work(options, PLANS["town"]).rows() == []
    assert did[4:] == ["no-queue, seed 0", "no-queue, seed 1"]
    did.clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))  # four threads each
    with pytest.raises(KeyboardInterrupt):
        Work(options, PLANS["town"]).rows()
    assert did[:2] == ["base, seed 0", "no-queue, seed 0"]


SIDE_BY_SIDE = """
import json, sys
from pathlib import Path

import yaml

from benchmarks.ablation_runs import Job, run_jobs, start_server
from configs.load import load_recipe

folder = Path(sys.argv[1])
recipe = load_recipe(folder / "recipe.yaml")
content = recipe.model_dump(mode="json")
content["eval"]["benchmarks"], content["tracking"]["enabled"] = [], False
content["trainer"] |= {"max_steps": 2, "validate_every_epochs": 0}
jobs = []
for name, lr in (("good", 1e-3), ("bad", -1.0)):
    own = json.loads(json.dumps(content))
    own["output"], own["optim"]["lr"] = str(folder / name / "train"), lr
    evaluations = {"base": {}, "original": {"rerank.geometry": "none"}}
    jobs.append(Job(name, folder / name, own, ("town",), folder, evaluations))
start_server(recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"enabled": False})}), 1)
print(json.dumps({job.name: [fault, job.found() if not fault else None] for job, fault in run_jobs(jobs, 2)}))
"""


@pytest.mark.slow
def test_runs_go_side_by_side_and_one_that_fails_says_why(tmp_path: Path) -> None:
    training.make_workplace(tmp_path)
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(training.ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    fault, good = found["good"]
    assert fault == ""
    assert sorted(good["evaluations"]) == ["base", "original"]
    of = good["evaluations"]["base"]["hits"]
    assert len(of["queries"]) == len(of["re-ranked"]["1"]) > 0
    assert of["retrieved"] == good["evaluations"]["original"]["hits"]["retrieved"]
    assert not (tmp_path / "good" / "features").exists()
    assert not (tmp_path / "good" / "train" / "checkpoints").exists()
    assert "optim.lr" in found["bad"][0]
    assert "(ended with status 2; " in found["bad"][0]


def test_the_commands_that_the_pages_name_are_understood() -> None:
    assert ablation.parsed(["--set", "town", "--steps", "60", "--at-once", "2", "--seeds", "1", "--drift"]).drift
    named = ablation.parsed(["--set", "town", "--seeds", "3", "--rows", "base", "no-queue"])
    assert (named.rows, named.drift, named.page_only) == (("base", "no-queue"), False, False)
    assert ablation.parsed(["--page-only", "--page", "page.md"]).page_only
