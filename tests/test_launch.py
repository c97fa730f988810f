"""What launch asks torchrun for, what submit writes, what the doctor finds."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch import torchrun
from launch.rank import fitting_world, release, wait_for_the_end
from launch.slurm import Resources, torchrun_job
from launch.stages import split_stages
from launch.submit import eval_verbs, main, stage_jobs
from launch.torchrun import main as launch_main
from launch.torchrun import plan
from trainer.routes import interface_environment, interface_of, loopback, route_to

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_choices_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def test_one_node_meets_on_loopback() -> None:
    launch = plan(["--nproc-per-node", "2"], ["train", "demo"])
    assert {"--nnodes=1", "--nproc-per-node=2", "--max-restarts=0", "--standalone"} <= set(launch.arguments)
    assert launch.arguments[-4:] == ["-m", "rerankvpr", "train", "demo"]
    assert launch.environment["GLOO_SOCKET_IFNAME"] == loopback()
    assert interface_environment("eth1", infiniband=False)["NCCL_SOCKET_IFNAME"] == "=eth1"  # and not eth10
    assert interface_environment("eth1", infiniband=True) == {"GLOO_SOCKET_IFNAME": "eth1"}


def test_an_older_torchrun_is_not_given_a_flag_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--shutdown-timeout=120" in plan(["--nproc-per-node", "1"], ["eval"]).arguments
    monkeypatch.setattr(torchrun, "_torchrun_has_shutdown_timeout", lambda: False)  # as of torch 2.11
    assert not [one for one in plan(["--nproc-per-node", "1"], ["eval"]).arguments if "shutdown" in one]
    with pytest.raises(ValueError, match="--shutdown-timeout 120: this torch gives processes 30 s"):
        plan(["--nproc-per-node", "1", "--shutdown-timeout", "120"], ["eval"])


def test_several_nodes_meet_on_the_interface_that_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = plan(["--nnodes", "2:4", "--nproc-per-node", "1", "--rdzv", "127.0.0.1:29999"], ["train", "demo"])
    assert {"--rdzv-endpoint=127.0.0.1:29999", "--nnodes=2:4", "--max-restarts=3"} <= set(launch.arguments)
    assert "--rdzv-conf=last_call_timeout=10" in launch.arguments
    assert launch.arguments[-6:] == ["rank", "--fit", "--", "train", "demo", "--resume"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert plan(["--nproc-per-node", "1"], ["eval"]).environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_printed_command_is_the_plan() -> None:
    launch = plan(["--nproc-per-node", "1", "--log-dir", "a b"], ["train", "demo", "--name", "x y"])
    words = shlex.split(launch.command())
    assert words == [*(f"{k}={v}" for k, v in launch.environment.items()), "torchrun", *launch.arguments]
    assert launch.arguments[launch.arguments.index("--log-dir") :][:2] == ["--log-dir", "a b"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs --rdzv HOST"),
        (["--nnodes", "4:2"], "--nnodes 4:2: expected a number of nodes or MIN:MAX"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0: expected a number, 1 or more"),
        (["--nnodes", "2", "--rdzv", "no-such-host.invalid"], "host 'no-such-host.invalid' is unknown here"),
    ],
)
def test_wrong_launches_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=r"^.*$") as error:
        plan(flags, ["train", "demo"])
    assert words in str(error.value)


def test_a_launch_that_restarts_does_not_go_back_to_a_named_checkpoint() -> None:
    with pytest.raises(ValueError, match="--resume runs/a: a training that may be restarted"):
        plan(["--max-restarts", "1", "--nproc-per-node", "1"], ["train", "demo", "--resume", "runs/a"])


def test_a_mistake_in_a_recipe_is_told_before_anything_is_started() -> None:
    with pytest.raises(ValueError, match="Shipped recipes"):
        launch_main(["--max-restarts", "3", "--nproc-per-node", "2", "--", "train"])
    with pytest.raises(ValueError, match=r"--data\.places-per-batch: 'many' is not a whole number"):
        launch_main(["--nproc-per-node", "2", "--", "train", "demo", "--data.places-per-batch", "many"])


@pytest.mark.slow
def test_weights_are_downloaded_once_before_ranks_start(tmp_path: Path) -> None:
    """Without a network that is one line of launch, and not one of each rank."""
    command = ["launch", "--nproc-per-node", "2", "--", "train", "gsv_cities_vitb", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "rerankvpr", *command],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("cannot be downloaded") == 1
    assert not re.search(r"\brank", done.stderr)


def test_routes() -> None:
    route = route_to("127.0.0.1")
    assert (route.interface, route.is_local, route.is_loopback) == (loopback(), True, True)
    assert interface_of("192.0.2.77") == ""  # of a range that nobody has


@given(st.integers(1, 500), st.integers(1, 200))
def test_the_fitting_world_is_the_largest_divisor(places: int, world: int) -> None:
    used = fitting_world(places, world)
    assert used <= world
    assert places % used == 0
    assert not any(places % size == 0 for size in range(used + 1, world + 1))


@pytest.mark.parametrize("rank_0_ends", ["well", "in a crash"])
def test_a_rank_that_is_not_needed_ends_as_the_training_does(rank_0_ends: str) -> None:
    """Over a real store: it waits, is told the status, and fails where rank 0 is gone without a word."""
    import torch.distributed as dist

    served = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, multi_tenant=True)
    seen = dist.TCPStore("127.0.0.1", served.port, 2, is_master=False, wait_for_workers=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_the_end, seen, 3)
        time.sleep(0.2)
        assert not waiting.done()
        if rank_0_ends == "well":
            release(served, 75, range(3, 4))
        else:
            del served
        assert waiting.result(timeout=20) == (75 if rank_0_ends == "well" else 1)


def bash_takes(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_training_script_says_what_was_asked(tmp_path: Path) -> None:
    want = Resources(
        nodes="4",
        gpus_per_node=8,
        time="12:00:00",
        account="vpr",
        container_image="a b.sqsh",
        mem="120G",
        cpus_per_task=96,
    )
    verb = ["train", "demo", "--name", "it's"]
    job = torchrun_job("train-demo", tmp_path / "job", verb, want, python="/env/bin/python", cwd=tmp_path)
    bash_takes(job.text)
    lines = job.text.splitlines()
    for option in (
        "nodes=4",
        "gpus-per-node=8",
        "time=12:00:00",
        "account=vpr",
        "mem=120G",
        "cpus-per-task=96",
        "signal=USR1@120",
    ):
        assert f"#SBATCH --{option}" in lines
    last_option = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last_option + 1])  # sbatch stops reading at the first command
    assert "--container-image=a b.sqsh" in shlex.split(next(line for line in lines if line.startswith("srun"))[:-1])
    assert shlex.join(verb) in job.text
    assert '"$SLURM_NNODES" --nproc-per-node 8' in job.text
    assert "srun --kill-on-bad-exit=0 --wait=60 --ntasks-per-node=1 --cpus-per-task=96 --cpu-bind=none" in job.text
    assert (
        '--nnodes 2:"$SLURM_NNODES"'
        in torchrun_job("t", tmp_path, verb, replace(want, nodes="2-4"), python="python", cwd=tmp_path).text
    )


def test_the_requeue_of_a_script(tmp_path: Path) -> None:
    """The script itself, run by bash with stand-ins for SLURM's commands: what it does with each way to end."""
    job = torchrun_job("t", tmp_path, ["train", "demo"], Resources(max_requeues=2), python="python", cwd=tmp_path)
    commands = tmp_path / "bin"
    commands.mkdir()

    def end(status: int, restarts: int, extra: str = "") -> tuple[int, bool]:
        asked = tmp_path / "requeued"
        asked.unlink(missing_ok=True)
        for name, body in {
            "srun": f"{extra}\nexit {status}",
            "scontrol": f'[ "$1" = requeue ] && touch {asked}; [ "$2" = node ] && echo NodeAddr=127.0.0.1; true',
            "sleep": "exec /bin/sleep 0.1",
        }.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}\n")
            (commands / name).chmod(0o755)
        env = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
        env |= {"SLURM_NNODES": "1", "SLURM_RESTART_COUNT": str(restarts)}
        done = subprocess.run(["bash", "-c", job.text], env=env, capture_output=True, text=True, check=False)
        return done.returncode, asked.exists()

    assert end(0, 0) == (0, False)
    assert end(75, 0) == (75, True)
    assert end(75, 2) == (75, False)  # as often as was allowed
    assert end(2, 0) == (2, False)  # a mistake stays one
    assert end(75, 0, "kill -TERM $PPID; sleep 1") == (75, False)  # cancelled, or requeued by Slurm
    assert end(75, 0, "kill -USR1 $PPID; sleep 1") == (75, True)


def test_stages_have_their_own_flags() -> None:
    stages = split_stages(["shard", "utm", "a", "b", "--then", "--nodes", "1", "--", "eval", "--checkpoint", "c"])
    assert stages == [([], ["shard", "utm", "a", "b"]), (["--nodes", "1"], ["eval", "--checkpoint", "c"])]
    with pytest.raises(ValueError, match="one of shard, train, index, eval, got 'dance'"):
        split_stages(["train", "demo", "--then", "dance"])


def test_evaluations_of_many_checkpoints_are_an_array() -> None:
    verbs = eval_verbs(["eval", "--checkpoint", "runs/a", "runs/b", "--out", "res", "--benchmarks", "town"])
    assert [verb[verb.index("--checkpoint") + 1] for verb in verbs] == ["runs/a", "runs/b"]
    assert [verb[verb.index("--out") + 1] for verb in verbs] == ["res/000-a", "res/001-b"]
    (job,) = stage_jobs(["eval", "--checkpoint", "runs/a", "runs/b", "--benchmarks", "town"], Resources())
    bash_takes(job.text)
    assert "#SBATCH --array=0-1" in job.text


def test_a_sharding_in_parts_is_an_array_and_an_index(tmp_path: Path) -> None:
    parts, index = stage_jobs(["shard", "gsv-cities", "src", str(tmp_path / "o")], Resources(array=3, gpus_per_node=8))
    assert "--part 2/3" in parts.text
    assert "gpus" not in parts.text
    assert "--part" not in index.text
    assert (parts.folder, index.name) == (tmp_path / "o" / "job", "shard-index")


def test_an_index_is_an_array_and_what_makes_it_or_one_job_over_nodes(tmp_path: Path) -> None:
    out = str(tmp_path / "i")
    build, add = ["index", "build", "db", "--checkpoint", "runs/a", "--out", out], ["index", "add", out, "more"]
    for verb in (build, add):
        (job,) = stage_jobs(verb, Resources(nodes="2", gpus_per_node=4))
        assert (job.folder, job.name) == (tmp_path / "i" / "job", f"index-{verb[1]}")
        assert f"-- {shlex.join(verb)}" in job.text
        assert "--nproc-per-node 4" in job.text
        parts, index = stage_jobs(verb, Resources(nodes="4", array=3, gpus_per_node=2))
        bash_takes(parts.text)
        assert ("#SBATCH --array=0-2" in parts.text, "#SBATCH --nodes=1" in parts.text) == (True, True)
        assert f"launch --nproc-per-node 2 -- {shlex.join([*verb, '--part', '2/3'])}" in parts.text
        assert (index.name, "--part" in index.text) == (f"index-{verb[1]}", False)
    for verb, words in (
        (["index", "info", out], "expected index build or index add"),
        ([*build, "--part", "0/3"], "leave --part out"),
        ([*build, "--imagesize", "3"], "imagesize"),
    ):
        with pytest.raises(ValueError, match=words):
            stage_jobs(verb, Resources(array=3))


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "output": str(tmp_path / "run")}))
    assert main(["--dry-run", "--nodes", "2", "--", "train", str(recipe)]) == 0
    assert f"# {tmp_path}/run/job/train-r.sbatch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_script_keeps_no_password(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a password") as error:
        stage_jobs(["train", "demo", "--tracking.uri", "http://me:hunter2@host:5000"], Resources())
    assert "hunter2" not in str(error.value)


def test_a_node_that_is_cut_off_ends_with_its_ranks() -> None:
    """A process with a child, whose rendezvous host answers and then does not."""
    code = (
        "import subprocess, sys, time; from launch.rendezvous import end_when_cut_off; "
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); "
        "end_when_cut_off('127.0.0.1', int(sys.argv[1]), limit_s=0.5, every_s=0.1); time.sleep(60)"
    )
    with socket.create_server(("127.0.0.1", 0)) as host:
        command = [sys.executable, "-c", code, str(host.getsockname()[1])]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout
        child = int(process.stdout.readline())
        host.accept()[0].close()
        time.sleep(1.0)
        assert process.poll() is None
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "has not reached 127.0.0.1" in errors
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
