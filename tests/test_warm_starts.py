"""Warm starts: a fork has the state of a new process, nothing is left behind, and the server's ends are survived."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import fork_server
from launch.torchrun import plan, preload

ROOT = Path(__file__).resolve().parent.parent
STARTS = 10  # tests/faults has 200
ENDED = "failed (exitcode: 2)"  # torchrun's line for each start


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def state_of_a_process() -> dict[str, Any]:
    """What a rank may see of where it comes from, after the imports of a training."""
    import logging
    import random
    import threading

    import numpy as np
    import torch

    fork_server._import_all(preload(["train"]))
    loggers = {name: log for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    return {
        "signals": {s.name: str(signal.getsignal(s)) for s in signal.Signals if signal.getsignal(s) is not None},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "environment": {k: v for k, v in os.environ.items() if k not in {"_", "_MLFLOW_TELEMETRY_SESSION_ID"}},
        "folder": str(Path.cwd()),
        "unbuffered": [stream.write_through for stream in (sys.stdout, sys.stderr)],
        "handlers": {name: [type(h).__name__ for h in log.handlers] for name, log in loggers.items() if log.handlers},
        "root_handlers": len(logging.root.handlers),
        "threads": threading.active_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork(),
        "descriptors": str(Path("/proc/self/fd/0").readlink()),
        "random": [random.random(), float(np.random.rand()), float(torch.rand(1))],
    }


def in_a_process(what: str, folder: Path, **more: str) -> str:
    """Runs a function of this module in a process that has no fork server yet; what it and its forks print."""
    done = subprocess.run(
        [sys.executable, "-u", "-m", "tests.test_warm_starts", what, str(folder)],  # as torchrun starts it
        cwd=folder,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def print_state() -> None:
    """As a program of its own prints it."""
    print(json.dumps(state_of_a_process()), flush=True)


def print_state_as_a_rank() -> None:
    """As a rank of a launch prints it."""
    fork_server.become_rank(["rank"])
    print_state()


def forks() -> None:
    """Two states of forks, one after the other, and how `rerankvpr` ends in them."""
    fork_server.start([*preload(["train"]), "tests.test_warm_starts"])
    for target, arguments in (
        (print_state_as_a_rank, ()),
        (print_state_as_a_rank, ()),
        (fork_server.run_rank, ("rerankvpr", "dance")),
    ):
        process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
        process.start()
        process.join()
        print("status", process.exitcode, flush=True)


@pytest.mark.slow
def test_a_fork_has_the_state_of_a_new_process(tmp_path: Path) -> None:
    """Signals, mask, environment, folder, handlers, threads, standard input; random numbers of its own; its status."""
    lines = in_a_process("forks", tmp_path).splitlines()
    states = [json.loads(line) for line in lines if line.startswith('{"signals"')]
    cold = json.loads(in_a_process("print_state", tmp_path).splitlines()[-1])
    one, other = states
    for a, b in zip(one.pop("random"), other.pop("random"), strict=True):
        assert a != b
    cold.pop("random")
    for state in (one, other):
        assert state["environment"] == cold["environment"]
        assert state == cold
    assert cold["cuda"] is False
    assert [line for line in lines if line.startswith("status")] == ["status 0", "status 0", "status 2"]
    assert any(line.startswith("rerankvpr: unknown verb 'dance'; nearest: ") for line in lines)


@pytest.mark.slow
def test_what_cannot_be_forked_is_said_and_runs_cold(tmp_path: Path) -> None:
    """An import that starts a thread: the rank is a new process, with the status and the output of one."""
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(300,), name='lost', daemon=True).start()\n"
    )
    text = in_a_process("unsafe", tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert "ranks of this node start cold: an import started threads (lost)" in text
    assert "unknown verb 'dance'" in text
    assert "status 2" in text


def unsafe() -> None:
    """One rank of a server that must not be forked."""
    fork_server.start(["starts_a_thread"])
    process = multiprocessing.get_context("forkserver").Process(
        target=fork_server.run_rank, args=("rerankvpr", "dance")
    )
    process.start()
    process.join()
    print("status", process.exitcode)


@pytest.mark.slow
def test_signals_wait_in_the_server_and_its_end_is_survived(tmp_path: Path) -> None:
    """A scheduler signals the whole process group: server and fork live on, and SIGTERM to the fork ends the fork.

    A killed server takes its forks with it, and another is there for the next one.
    """
    in_a_process("signals", tmp_path)


def signals() -> None:
    """The body of the test, in a process that has no fork server yet."""
    fork_server.start(["tests.test_warm_starts"])
    context = multiprocessing.get_context("forkserver")

    def fork() -> Any:
        process = context.Process(target=sleep_as_a_rank)
        process.start()
        return process

    one = fork()
    server = psutil.Process(one.pid).parent()
    assert server
    until(lambda: "sleeper" in psutil.Process(one.pid).cmdline())
    for number in fork_server.HELD:
        server.send_signal(number)
    time.sleep(0.5)
    assert one.is_alive()
    os.kill(one.pid, signal.SIGTERM)
    one.join(30)
    assert one.exitcode == -signal.SIGTERM
    other = fork()
    rank = psutil.Process(other.pid)
    until(lambda: "sleeper" in rank.cmdline())
    server.kill()
    until(lambda: not rank.is_running())
    again = fork()
    until(lambda: "sleeper" in psutil.Process(again.pid).cmdline())
    assert psutil.Process(again.pid).ppid() != server.pid
    again.kill()
    again.join(30)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sleep_as_a_rank() -> None:
    fork_server.become_rank(["sleeper"])
    time.sleep(300)


def test_the_flags_of_a_start() -> None:
    assert plan(["--nproc-per-node", "1"], ["train", "demo"]).start_method == "forkserver"
    cold = plan(["--nproc-per-node", "1", "--start-method", "spawn"], ["train", "demo"])
    assert cold.start_method == "spawn"
    assert not any("start-method" in argument for argument in cold.arguments)
    with pytest.raises(ValueError, match="--start-method: 'fork' is not one of forkserver, spawn"):
        plan(["--start-method", "fork"], ["train", "demo"])
    assert {"mlflow", "model.dinov2"} <= set(preload(["train", "demo"]))
    assert "mlflow" not in preload(["doctor"])


def with_shared_memory_of_its_own() -> list[str]:
    """What gives the command behind it a /dev/shm that nobody else uses; nothing where that is not allowed."""
    prefix = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


def leaks(starts: int, folder: Path) -> None:
    """Starts two ranks that form a group and end with an error, again and again, and looks for what they leave."""
    flags = ["launch", "--nproc-per-node", "2", "--max-restarts", str(starts - 1)]
    nothing = ["index", "build", "/nowhere", "--checkpoint", "vits14", "--out", str(folder / "index")]
    alone = with_shared_memory_of_its_own()
    command = [*alone, sys.executable, "-m", "rerankvpr", *flags, "--", *nothing]
    temporary = folder / "tmp"
    temporary.mkdir()
    shared = set(Path("/dev/shm").iterdir())
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(TMPDIR=str(temporary)), stdout=log, stderr=log, start_new_session=True
        )
    agent, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        done = (folder / "log.txt").read_text().count(ENDED)
        try:
            family = [agent, *agent.children(recursive=True)]
            server = next(one for one in family if "rerankvpr:fork-server" in one.cmdline())
            ports = sum(len(one.net_connections("tcp")) for one in (agent, server))
            pieces = len(list(Path(f"/proc/{agent.pid}/root/dev/shm").iterdir()))
            figures = (agent.num_fds(), server.num_fds(), len(family), ports, agent.num_threads(), pieces)
            seen.append((done, *figures))
        except (psutil.Error, StopIteration, FileNotFoundError):
            pass
        time.sleep(0.1)  # each look reads all processes of the machine
    text = (folder / "log.txt").read_text()
    assert text.count(ENDED) == starts, text[-3000:]
    assert process.returncode == 2
    third = starts // 3
    early, late = (
        [min(f) for f in zip(*(s[1:] for s in seen if low <= s[0] < high), strict=True)]  # between two starts
        for low, high in ((1, 1 + third), (starts - third, starts))
    )
    names = ("agent's descriptors", "server's descriptors", "processes", "ports", "agent's threads", "shared memory")
    for name, before, after in zip(names, early, late, strict=True):
        assert after <= before + 2, f"{name}: {before} in the first {third} starts, {after} in the last"
    if not alone:
        until(lambda: set(Path("/dev/shm").iterdir()) <= shared, 30)
    # torchrun's logs, and the one folder that torch has for each user
    assert [f.name for f in temporary.iterdir() if not re.match("torchelastic_|torchinductor_", f.name)] == []
    until(lambda: not any(in_session(one, process.pid) for one in psutil.process_iter()), 30)  # the kernel ends them


def in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


@pytest.mark.slow
def test_starts_in_a_row_leak_nothing(tmp_path: Path) -> None:
    leaks(STARTS, tmp_path)


if __name__ == "__main__":
    from tests import test_warm_starts  # for forks, which know no functions of `__main__`

    getattr(test_warm_starts, sys.argv[1])()
