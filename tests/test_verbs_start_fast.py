"""What verbs import: no torch for help and mistakes, no trackers and networks for data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import VERBS
from launch.completion import SHELLS, commands, completion_script
from tests.photos import write_gsv_cities

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("torch", "torchvision", "deepspeed", "mlflow", "timm", "faiss", "matplotlib", "scipy")

# Forks a process for each command line of argv[1], once the modules of argv[2:] are there: each meets the verbs' own
# not yet imported.
SCRIPT = """
import importlib, json, os, sys
import tyro, configs.schema  # common to most, and fast
from launch import cli
for module in sys.argv[2:]:
    importlib.import_module(module)
for argv in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            status = cli.main(argv)
        except SystemExit as stop:
            status = stop.code
        roots = sorted({name.partition(".")[0] for name in sys.modules})
        print("IMPORTED", json.dumps([argv, status, roots]), flush=True)
        os._exit(0)
    os.wait()
"""


def imported(
    *command_lines: list[str], folder: Path = ROOT, allowed: tuple[str, ...] = ()
) -> dict[str, tuple[int, set[str]]]:
    """Exit status and imported packages of each command line, by its text; `allowed` modules are imported before."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(command_lines), *allowed]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    said = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("IMPORTED ")]
    assert len(said) == len(command_lines), done.stdout + done.stderr
    return {" ".join(argv): (status, set(packages)) for argv, status, packages in said}


@pytest.mark.slow
def test_help_and_mistakes_import_nothing_slow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("memory: {sise: 3}\n")
    good = [["--help"], ["--version"], ["--completion", "bash"], ["eval", "--list"], ["train", "demo", "--help"]]
    good += [[verb, "--help"] for verb in VERBS]
    good += [["shard", "utm", "--help"], ["launch", "--dry-run", "--nproc-per-node", "2", "--", "train", "demo"]]
    good += [["submit", "--dry-run", "--", "shard", "utm", "a", "b"]]
    mistakes = [["trian"], ["train", "nowhere"], ["train", str(bad)], ["train", "demo", "--memory.sise", "3"]]
    mistakes += [["launch", "--", "train", str(bad)], ["submit", "--", "train", str(bad)], ["launch", "train"]]
    parsed = ("eval", "demo", "export", "sync", "doctor", "inspect", "verify")
    mistakes += [[verb, "--no-such-flag"] for verb in parsed]
    mistakes += [["shard", "gsv"], ["shard", "utm", "a", "b", "--no-such-flag"], ["eval"], ["sync"]]
    mistakes += [["export", "nowhere", "net.safetensors"], ["eval", "--checkpoint", "nowhere", "--benchmarks", "town"]]
    said = imported(*good, *mistakes, folder=tmp_path)
    for line, (status, packages) in said.items():
        assert not packages & set(SLOW), line
        assert status == (0 if line.split() in good else 2), line


@pytest.mark.slow
def test_verbs_of_data_import_no_trackers_and_no_networks(tmp_path: Path) -> None:
    write_gsv_cities(tmp_path / "native", {"Aachen": dict.fromkeys(range(5), 4)})
    said = imported(
        ["shard", "gsv-cities", "native", "set"],
        ["verify", "set"],
        ["inspect", "set", "--out", "seen", "--plan", "plan.parquet", "--places-per-batch", "2"],
        folder=tmp_path,
        allowed=("torch",),
    )
    for line, (status, packages) in said.items():
        assert status == 0, line
        assert not packages & {"deepspeed", "mlflow", "timm", "pytorch_metric_learning", "faiss"}, line


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_verb(shell: str) -> None:
    script = completion_script(shell)
    assert set(commands()) == set(VERBS) - {"rank"}
    assert all(verb in script for verb in commands())
    assert "memory.start-epoch" in script


def test_bash_completes_verbs_flags_and_values(tmp_path: Path) -> None:
    (tmp_path / "rerankvpr.bash").write_text(completion_script("bash"))
    script = """
    source rerankvpr.bash
    complete_word() {
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _tyro_rerankvpr; echo "${COMPREPLY[@]}"
    }
    complete_word rerankvpr ver
    complete_word rerankvpr train demo --memory.start
    complete_word rerankvpr train demo --memory.placement ''
    complete_word rerankvpr shard m
    complete_word rerankvpr launch --max
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["verify"],
        ["--memory.start-epoch"],
        ["replicated", "sharded"],
        ["manifest", "msls"],
        ["--max-restarts"],
    ]


def test_version_names_what_a_report_needs() -> None:
    from importlib import metadata

    done = subprocess.run([sys.executable, "-m", "rerankvpr", "--version"], cwd=ROOT, capture_output=True, text=True)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {name: lines[name] for name in ("rerankvpr", "torch", "deepspeed")} == {
        name: metadata.version(name) for name in ("rerankvpr", "torch", "deepspeed")
    }
    assert {"faiss-gpu", "faiss-cpu"} & set(lines)
    import torch

    assert lines["cuda"] == (torch.version.cuda or "none, torch was built for CPUs")
