"""Jobs that `rerankvpr submit` writes, in a real SLURM with virtual nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cluster.slurm import Slurm
from tests.cluster.workplace import ROOT, environment, losses, steps_done_twice


def submit(slurm: Slurm, folder: Path, *argv: str) -> dict[str, str]:
    """Job numbers by job name, as `rerankvpr submit` prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "rerankvpr", "submit", *argv],
        cwd=folder,
        env=environment() | slurm.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\S+): job (\d+)", done.stdout, flags=re.MULTILINE))


def test_shard_train_eval_are_one_submission(two_nodes: Slurm, workplace: Path) -> None:
    """An array of two shard tasks, its index, a training on two nodes, an evaluation; the recalls are in MLflow."""
    recipe, store = str(workplace / "recipe.yaml"), f"sqlite:///{workplace}/mlflow.db"
    jobs = submit(
        two_nodes,
        workplace,
        *("--nodes", "2", "--time", "10", "--array", "2"),
        *("--", "shard", "gsv-cities", "native", "pipeline/shards", "--shard-mb", "1"),
        *("--then", "train", recipe, "--output", "pipeline/run", "--data.shards", "pipeline/shards"),
        *("--trainer.max-steps", "12"),
        *("--then", "--nodes", "1", "--", "eval", "--checkpoint", "pipeline/run", "--out", "pipeline/eval"),
        *("--benchmarks", "town", "--track", store),
    )
    assert list(jobs) == ["shard", "shard-index", "train-noise", "eval"]
    for number in jobs.values():
        two_nodes.wait(number, "COMPLETED", 240)
    assert sorted(losses(workplace / "pipeline" / "run")) == [*range(1, 13)]
    assert "2 node(s) n[1-2]" in two_nodes.log(jobs["train-noise"])
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("rerankvpr")
    runs = {run.data.tags["mlflow.source.name"]: run for run in client.search_runs([experiment.experiment_id])}
    training, evaluation = runs["rerankvpr train"], runs["rerankvpr eval"]
    assert training.info.status == evaluation.info.status == "FINISHED"
    assert evaluation.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert 0 <= evaluation.data.metrics["eval/town/recall_1"] <= 100
    assert {"eval/town/recall_5", "eval/town/reranked_recall_1"} <= set(evaluation.data.metrics)


def submit_training(slurm: Slurm, workplace: Path, output: str, steps: int, *flags: str, resume: bool = False) -> str:
    """A training on two nodes, untracked; its job number."""
    train = ("train", str(workplace / "recipe.yaml"), "--output", output, "--trainer.max-steps", str(steps))
    untracked = ("--tracking.enabled", "False", "--eval.benchmarks", *(["--resume"] if resume else []))
    jobs = submit(slurm, workplace, "--nodes", "2", "--sbatch", "exclusive", *flags, "--", *train, *untracked)
    return jobs["train-noise"]


def check_curve(workplace: Path, unbroken: Path, output: str, steps: int) -> None:
    """The losses of a run are the bits of the unbroken one's, as far as that goes, and none is missing."""
    one, ours = losses(unbroken), losses(workplace / output)
    assert sorted(ours) == [*range(1, steps + 1)]
    both = sorted(one.keys() & ours.keys())
    assert [ours[s] for s in both] == [one[s] for s in both]


def test_time_limit_saves_requeues_and_resumes_to_the_end(two_nodes: Slurm, workplace: Path, unbroken: Path) -> None:
    """USR1 before the time limit: the running step is the last, none is done twice, and the job ends COMPLETED."""
    steps = 1000
    number = submit_training(two_nodes, workplace, "limit", steps, "--time", "50", "--signal-s", "60")
    two_nodes.wait_for(number, lambda: max(losses(workplace / "limit"), default=0) >= 20, 240)
    minutes = two_nodes.elapsed_s(number) // 60 + 2
    two_nodes.run("scontrol", "update", f"jobid={number}", f"timelimit={minutes}")  # so that USR1 is due
    two_nodes.wait_for(number, lambda: int(two_nodes.job(number)["Restarts"]) == 1, 120)
    two_nodes.run("scontrol", "update", f"jobid={number}", "timelimit=50")
    two_nodes.wait(number, "COMPLETED", 400)
    log = two_nodes.log(number)
    assert "saved; requeued (1 of at most 20)" in log
    assert log.count("asked to stop") == log.count("resumed from") == 1
    assert steps_done_twice(workplace / "limit") == 0
    check_curve(workplace, unbroken, "limit", steps)


def test_preempted_requeued_by_the_controller_and_a_node_lost(
    two_nodes: Slurm, workplace: Path, unbroken: Path
) -> None:
    """One training meets all three and ends with the unbroken curve."""
    steps, output = 300, "interrupted"
    number = submit_training(two_nodes, workplace, output, steps, "--time", "20")

    def reach(step: int) -> None:
        two_nodes.wait_for(number, lambda: max(losses(workplace / output), default=0) >= step, 180)

    def restarted(times: int) -> None:
        two_nodes.wait_for(number, lambda: f"start {times}:" in two_nodes.log(number), 120)

    reach(40)
    urgent = ("--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    high = two_nodes.run("sbatch", "--parsable", *urgent).strip()
    two_nodes.wait(high, "COMPLETED", 60)
    restarted(1)
    assert "saved; requeued (1 of at most 20)" in two_nodes.log(number)
    assert steps_done_twice(workplace / output) == 0

    reach(max(losses(workplace / output)) + 40)
    two_nodes.run("scontrol", "requeue", number)
    restarted(2)
    assert two_nodes.log(number).count("asked to stop") == 2
    assert "saved; requeued (2 of" not in two_nodes.log(number)
    assert steps_done_twice(workplace / output) == 0

    reach(max(losses(workplace / output)) + 40)
    two_nodes.lose_node("n2")
    two_nodes.wait_for(number, lambda: int(two_nodes.job(number)["Restarts"]) == 3, 60)
    two_nodes.return_node("n2")
    two_nodes.wait(number, "COMPLETED", 240)
    assert two_nodes.log(number).count("resumed from") == 3
    assert steps_done_twice(workplace / output) <= 40  # back to the last checkpoint that was written
    check_curve(workplace, unbroken, output, steps)


def test_a_cancelled_job_saves_and_stays_cancelled(two_nodes: Slurm, workplace: Path, unbroken: Path) -> None:
    """scancel; what was trained is there for a submission with --resume."""
    number = submit_training(two_nodes, workplace, "cancelled", 1500, "--time", "20")
    two_nodes.wait_for(number, lambda: max(losses(workplace / "cancelled"), default=0) >= 40, 180)
    two_nodes.run("scancel", number)
    two_nodes.wait(number, "CANCELLED", 60)
    two_nodes.wait_until_idle(60)
    assert "asked to stop" in two_nodes.log(number)
    assert two_nodes.states(number) == ["CANCELLED"]
    reached = max(losses(workplace / "cancelled"))
    checkpoint = (workplace / "cancelled" / "checkpoints" / "latest").read_text().strip()
    assert checkpoint == f"step-{reached:08d}"
    number = submit_training(two_nodes, workplace, "cancelled", reached + 10, "--time", "20", resume=True)
    two_nodes.wait(number, "COMPLETED", 120)
    check_curve(workplace, unbroken, "cancelled", reached + 10)


def test_four_nodes_and_whatever_is_free(four_nodes: Slurm, workplace: Path, unbroken: Path) -> None:
    """Four nodes train as two do; `--nodes 2-4` takes the three that are left and trains on two of them, P being 4."""
    train = ("train", str(workplace / "recipe.yaml"), "--tracking.enabled", "False", "--eval.benchmarks")
    short = ("--trainer.max-steps", "40")
    options = ("--time", "5", "--sbatch", "exclusive")
    number = submit(four_nodes, workplace, "--nodes", "4", *options, "--", *train, *short, "--output", "four")
    four_nodes.wait(number["train-noise"], "COMPLETED", 180)
    one, ours = losses(unbroken), losses(workplace / "four")
    assert [ours[s] for s in range(1, 41)] == pytest.approx([one[s] for s in range(1, 41)], rel=5e-3)
    four_nodes.wait_until_idle(60)
    four_nodes.run("scontrol", "update", "nodename=n4", "state=drain", "reason=test")
    number = submit(four_nodes, workplace, "--nodes", "2-4", *options, "--", *train, *short, "--output", "range")
    four_nodes.wait(number["train-noise"], "COMPLETED", 180)
    assert "2 of 3 ranks train" in four_nodes.log(number["train-noise"])
    check_curve(workplace, unbroken, "range", 40)
