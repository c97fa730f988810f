"""Nodes as most sites have them: tasks are bound to cores that were asked for, and each node has a /tmp of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launch.slurm import Resources
from tests.cluster.slurm import Slurm
from tests.cluster.test_job_script import submit as submit_stand_in
from tests.cluster.test_slurm import check_curve, submit
from tests.cluster.workplace import environment, losses

CORES = "python3 -c 'import os; print(len(os.sched_getaffinity(0)))'"


def test_the_agent_of_each_node_has_all_cores_that_were_asked_for(site: Slurm, workplace: Path) -> None:
    """Where a site binds tasks to cores, and srun takes no --cpus-per-task from its job, a bare srun gives one core."""
    out = workplace / "cores"
    out.mkdir()
    setup = (
        "export SLURM_CPU_BIND=cores",
        f"env -u SRUN_CPUS_PER_TASK srun --exact --nodes=1 --ntasks=1 {CORES} > {out}/bare",
        f"srun --exact --nodes=1 --ntasks=1 {CORES} > {out}/exported",
    )
    job = submit_stand_in(site, out, Resources(nodes="2", time="5", cpus_per_task=2, setup=setup))
    job.wait_for_start(1)
    (out / "finish").touch()
    site.wait(job.number, "COMPLETED", 60)
    assert ((out / "bare").read_text(), (out / "exported").read_text()) == ("1\n", "2\n")
    assert sorted(job.lines("cores")) == ["n1 2", "n2 2"]


def test_a_training_with_benchmarks_is_lost_resumed_and_evaluated(site: Slurm, workplace: Path, unbroken: Path) -> None:
    """Features go where both nodes see them; n2 loses power in between; the curve is the unbroken one's."""
    output, steps = "site", 120
    train = ("train", str(workplace / "recipe.yaml"), "--output", output, "--trainer.max-steps", str(steps))
    flags = ("--nodes", "2", "--cpus-per-task", "2", "--time", "20")
    jobs = submit(
        site,
        workplace,
        *(*flags, "--", *train, "--tracking.enabled", "False"),
        *("--then", "eval", "--checkpoint", output, "--benchmarks", "town", "--out", "site-eval"),
    )
    training = jobs["train-noise"]
    site.wait_for(training, lambda: max(losses(workplace / output), default=0) >= 40, 600)
    site.lose_node("n2")
    site.wait_for(training, lambda: int(site.job(training)["Restarts"]) == 1, 120)
    site.return_node("n2")
    for number in jobs.values():
        site.wait(number, "COMPLETED", 600)
    check_curve(workplace, unbroken, output, steps)
    log = site.log(training)
    assert log.count("resumed from") == 1
    assert "untrained: town" in log
    trained = json.loads((workplace / output / "results.json").read_text())
    evaluated = json.loads((workplace / "site-eval" / "results.json").read_text())
    assert evaluated["results"][0]["recall"] == trained["results"][0]["recall"]
    assert trained["before"][0]["name"] == "town"
    assert not list((workplace / output).glob(".features-*"))


def test_plain_srun_of_the_trainer_is_one_training(site: Slurm, workplace: Path, unbroken: Path) -> None:
    """`srun python -m trainer` without an agent: the tasks find each other by SLURM's variables."""
    output, steps = "plain-srun", 40
    script = workplace / "plain.sbatch"
    flags = f"--output {output} --trainer.max-steps {steps} --tracking.enabled False"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output={workplace}/plain-%j.log --chdir={workplace}\n"
        f"srun --export=ALL {sys.executable} -m trainer {workplace}/recipe.yaml {flags}\n"
    )
    pairs = [f"{key}={environment()[key]}" for key in ("OMP_NUM_THREADS", "PYTHONPATH")]
    number = site.run("env", *pairs, "sbatch", "--parsable", str(script)).strip()
    site.wait(number, "COMPLETED", 600)
    check_curve(workplace, unbroken, output, steps)
    assert "2 rank(s) on cpu" in site.log(number)
