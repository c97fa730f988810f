"""Jobs that `rerankvpr submit` writes, in a real SLURM with virtual nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from tests.cluster.slurm import Slurm
from tests.cluster.workplace import ROOT, environment, losses


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
