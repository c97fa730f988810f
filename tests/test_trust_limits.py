"""What a machine does not give: memory for a queue, locks in /dev/shm, room for a log; and two writers of one name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.schema import Recipe
from data_pipeline.folder_lock import LOCK, FolderLock, lock_of
from launch.cli import main as run
from launch.export_command import main as export
from launch.torchrun import _what_killed
from tests.checkpoints import write_checkpoint
from tests.memory_groups import join_group, memory_group
from trainer.devices import check_room, memory_bytes
from trainer.place_loss import build_queue

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")


# Memory


@pytest.mark.parametrize("size", [10**10, 10**12, 2**63, 10**400])
@pytest.mark.parametrize("decay", ["exponential", "measured"])
def test_a_queue_that_no_rank_could_hold_is_refused(size: int, decay: str) -> None:
    recipe = Recipe.model_validate({"memory": {"size": size, "decay": decay, "drift_every": 2}})
    with pytest.raises(ValueError, match=rf"^memory.size {size}: takes [\d,.]+ GB of a rank, on a machine that has"):
        build_queue(recipe, 384, CPU, None)


def test_a_machines_memory_is_a_cgroups_if_that_has_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = memory_bytes(CPU)
    two, one = tmp_path / "slurm" / "job_7", tmp_path / "memory"  # versions 2 and 1; a container sees the root alone
    two.mkdir(parents=True)
    one.mkdir()
    (tmp_path / "own").write_text("4:cpu,memory:/docker/0a1b\n2:cpuset:/\n0::/slurm/job_7\n")
    monkeypatch.setattr("trainer.devices.CGROUPS", tmp_path)
    monkeypatch.setattr("trainer.devices.OWN_CGROUPS", tmp_path / "own")
    (two / "memory.max").write_text("max\n")
    for file in (two.parent / "memory.max", tmp_path / "memory.max", one / "memory.limit_in_bytes", two / "memory.max"):
        for text, expected in (("max", whole), (str(2**63 - 4096), whole), ("1000000000", 10**9)):
            file.write_text(text + "\n")
            assert memory_bytes(CPU) == expected, file
        check_room("memory.size 1", 10**9, CPU)
        with pytest.raises(ValueError, match=r"memory.size 2: takes 1.0 GB of a rank, in a container or job"):
            check_room("memory.size 2", 10**9 + 1, CPU)
        file.write_text("max\n")


def test_in_a_cgroup_of_the_kernels_its_limit_is_the_memory(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with memory_group(1 << 30) as group:
        if (child := os.fork()) == 0:  # a process to put into it, which ends at once
            try:
                join_group(group, os.getpid())
                said.write_text(str(memory_bytes(CPU)))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    assert said.read_text() == str(1 << 30)


def test_a_rank_that_was_killed_says_by_what() -> None:
    assert "SIGKILL): out of memory, if nobody sent it" in _what_killed(-9)
    assert _what_killed(-11) == " (SIGSEGV)"
    assert _what_killed(1) == _what_killed(-50) == ""


# /dev/shm

NONE, FULL, SMALL = "none", "full", "small"
SHM = {NONE: ("ro", 0), FULL: ("size=1m", 2 << 20), SMALL: ("size=1m", 0)}  # how it is mounted, bytes written to it


def with_shm(kind: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command whose /dev/shm is one of `SHM`; skips the test where that cannot be made."""
    options, taken = SHM[kind]
    fill = f"head -c {taken} /dev/zero > /dev/shm/x" if taken else ":"
    script = f'mount -t tmpfs -o {options} tmpfs /dev/shm && {{ {fill}; exec "$@"; }}'
    try:
        probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=False)
    except FileNotFoundError:
        pytest.skip("no unshare command")
    if probe.returncode:
        pytest.skip("no mount namespace can be made here")
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", sys.executable, *command],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )


@pytest.mark.parametrize("kind", [NONE, FULL])
def test_ranks_start_cold_where_processes_share_no_locks(kind: str) -> None:
    done = with_shm(kind, "-c", "from launch import fork_server; print(fork_server.unavailable())")
    assert re.fullmatch(r"/dev/shm, where processes share locks, cannot be used \(.+\)\n", done.stdout), done


def test_a_pool_of_processes_is_refused_there_in_a_line() -> None:
    done = with_shm(NONE, "-c", "from data_pipeline.shared_locks import process_pool as p; p(2)")
    assert done.stderr.splitlines()[-1].startswith("OSError: 2 processes: /dev/shm, where processes share locks,")


# A log on a full disk


def test_a_log_on_a_full_disk_ends_nothing() -> None:
    code = """
import sys
from rich.console import Console
from configs.full_disk import LossyStream
from configs.secrets import clean_streams
clean_streams()
log = LossyStream(sys.stdout)
console = Console(file=log)
for step in range(2000):
    console.print("step", step)
print("an error", file=sys.stderr, flush=True)
log.give_up()
"""
    told = r"an error\nrerankvpr: stdout: No space .*; lines .* lost\n"
    for shell, err in ((">/dev/full", told), ("&>/dev/full", "")):
        command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(err, done.stderr)


# Two at once


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ["net.safetensors", "net"])
def test_a_second_export_to_one_name_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.model_validate({"model": {"backbone": "tiny14", "weights": "random"}})
    write_checkpoint(tmp_path / "run", recipe)
    out = tmp_path / "out" / name
    with lock_of(out, "rerankvpr export"):
        line = refused(["export", str(tmp_path / "run"), str(out)], capsys)
        assert line.startswith(f"rerankvpr: {out}: another process (rerankvpr export, pid {os.getpid()} on ")
        assert export([str(tmp_path / "run"), str(tmp_path / "out" / "other.safetensors")]) == 0
    assert export([str(tmp_path / "run"), str(out)]) == 0
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_a_second_inspection_into_one_folder_is_one_line(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FolderLock(tmp_path, "rerankvpr inspect", name=f"{LOCK}.inspect"):
        line = refused(["inspect", str(shard_set), "--out", str(tmp_path)], capsys)
    assert line.startswith(f"rerankvpr: {tmp_path}: another process (rerankvpr inspect, pid {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []
