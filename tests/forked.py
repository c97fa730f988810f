"""Processes that start in milliseconds: forked from a server that has imported what they need.

`run` and `start` are `python -m MODULE ...` in a process, a working folder and an environment of its own, as subprocess
gives it, without the ten seconds that importing torch, DeepSpeed, MLflow and the trainer takes.
So is the first fork server that such a program starts, as `rerankvpr launch` does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing.forkserver
import multiprocessing.util
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from launch.fork_server import SERVER_MODULE

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["tests.warm"]
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a CUDA context does not outlive a fork
}
SCRATCH = "RERANKVPR_TEST_SCRATCH"  # in the environment of forked processes


@functools.cache
def scratch() -> Path:
    """A folder of this process and those forked from it, for what tests make once; it goes when this process ends."""
    if SCRATCH in os.environ:
        return Path(os.environ[SCRATCH])
    folder = Path(tempfile.mkdtemp(prefix="made-once-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def server() -> ForkServerContext:
    """The fork server of this process, started at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = SERVER_ENVIRONMENT | {SCRATCH: str(scratch())}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def share_server() -> None:
    """Starts the server for this process and for those that `os.fork` makes of it, which could not wait for it."""
    server()
    known = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=lambda: setattr(known, "ensure_running", lambda: None))


def fork(target: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """`target(*args)` in a started process. It leads a session of its own; see `kill`."""
    process = server().Process(target=_lead, args=(target, *args))
    process.start()
    atexit.register(kill, process)  # multiprocessing would wait for one that a failed test has left
    return process


def _lead(target: Callable[..., Any], *args: Any) -> None:
    os.setsid()
    target(*args)


def kill(process: ForkServerProcess) -> None:
    """SIGKILL to a forked process and to all that it started, if it still runs."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        # Of a process that has ended the number may be another's; of one that has just begun the session may be none.
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL) if os.getsid(process.pid) == process.pid else process.kill()
    process.join()


class Command:
    """`python -m MODULE ARGUMENTS` as a forked process, with what subprocess.Popen offers of it."""

    def __init__(
        self, folder: Path, *command: str, environment: Mapping[str, str] | None = None, apart: bool = False
    ) -> None:
        """Runs in `folder`; `environment` comes on top of this process's. stderr goes with stdout unless `apart`."""
        self.args: Sequence[str] = command
        self._printed = tempfile.TemporaryDirectory(prefix="printed-")
        self._out = Path(self._printed.name) / "out"
        self._err = Path(self._printed.name) / ("err" if apart else "out")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
        self._process = fork(_run_module, folder, command, env, self._out, self._err)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, minus a signal's number if that ended it, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def output(self) -> tuple[str, str]:
        """stdout and stderr so far; all is in the first unless they were asked for apart."""
        out, err = (file.read_text() if file.exists() else "" for file in (self._out, self._err))
        return out, err if self._err != self._out else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """stdout and stderr once it has ended. Raises subprocess.TimeoutExpired, and leaves it running."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0, output=self.output()[0].encode())
        return self.output()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status once it has ended. Raises subprocess.TimeoutExpired."""
        self.communicate(timeout)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and to all that it started."""
        kill(self._process)


def run(
    folder: Path, *command: str, environment: Mapping[str, str] | None = None, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...` to its end; stdout and stderr apart. Raises subprocess.TimeoutExpired after killing it."""
    process = Command(folder, *command, environment=environment, apart=True)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _run_module(folder: Path, command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - for the life of the process
    redirect(out, sys.stdout.fileno())
    redirect(err, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [command[0], *command[1:]]
    _first_server_is_a_fork()
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _first_server_is_a_fork() -> None:
    """Lets the first fork server that a launch starts be a fork of it: what it would import is here already.

    Its place among processes, its descriptors and all that it does are those of a new one, as is every later server.
    """
    in_a_new_process = multiprocessing.util.spawnv_passfds

    def start(path: bytes, arguments: Sequence[Any], passed: Sequence[int]) -> int:
        code = str(arguments[-1])
        if SERVER_MODULE not in code:
            return int(in_a_new_process(path, arguments, passed))
        multiprocessing.util.spawnv_passfds = in_a_new_process
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        child = os.fork()
        if child == 0:
            try:
                _close_all_but({0, 1, 2, sys.stdin.fileno(), *map(int, passed)})
                known = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
                known.__init__()  # its lock is held by the start that this is a part of
                exec(code, {})
            finally:
                os._exit(1)
        return child

    multiprocessing.util.spawnv_passfds = start


def _close_all_but(kept: set[int]) -> None:
    for descriptor in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def redirect(file: Path, descriptor: int) -> None:
    """Lets what this process writes to a descriptor go to the end of a file."""
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def wait_until(done: Callable[[], object], limit_s: float) -> bool:
    """Whether `done()` became true within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
