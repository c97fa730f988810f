"""How a command ends on signals, closed or full streams, and errors of any kind: one line, in bounded time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.interrupted import one_line_when_interrupted

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# A verb that says that it has begun and then waits, in Python or in C code that no exception reaches.
WAITING = """
import os, sys, time, types
from launch import cli, interrupted
interrupted.GRACE_S = 1.0
verb = types.ModuleType("waiting_verb")
def main(argv):
    if argv != ["tidying"]:
        print("begun", flush=True)
    if argv == ["c"]:
        import torch.distributed as dist
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.get("what nobody sets")
    if argv == ["swallowed"]:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise AttributeError("module numpy has no attribute matrix")
    if argv == ["tidying"]:
        interrupted.GRACE_S = 30.0
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("tidying", flush=True)
            time.sleep(1)
            print("tidied", flush=True)
    if argv == ["flushing"]:
        os.set_blocking(1, False)
        try:
            while True:
                os.write(1, b"x" * 1024)
        except BlockingIOError:
            os.set_blocking(1, True)
        print("the rest")
        print("full", file=sys.stderr, flush=True)
        return 3
    if argv == ["done"]:
        import atexit
        atexit.register(time.sleep, 60)
        atexit.register(print, "done", flush=True)
        return 3
    time.sleep(60)
verb.main = main
sys.modules["waiting_verb"] = verb
cli.VERBS["eval"] = cli.Verb("", "", "waiting_verb:main")
from rerankvpr import main as run
sys.argv = ["rerankvpr", "eval", *sys.argv[1:]]
run()
"""

RAISING = """
import sys, types
from launch import cli
verb = types.ModuleType("raising_verb")
def main(argv):
    raise eval(argv[0])
verb.main = main
sys.modules["raising_verb"] = verb
cli.VERBS["eval"] = cli.Verb("", "", "raising_verb:main")
from rerankvpr import main as run
sys.argv = ["rerankvpr", "eval", *sys.argv[1:]]
run()
"""


def run(*argv: str, shell: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env or ENV, timeout=120, check=False)


@pytest.mark.parametrize(("number", "how"), [(signal.SIGTERM, ""), (signal.SIGINT, ""), (signal.SIGINT, "swallowed")])
def test_a_signal_ends_a_verb_with_one_line(number: signal.Signals, how: str) -> None:
    """Also if a library makes an error of its own of it, as imports do."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, how], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == (
        f"rerankvpr: eval: stopped by {number.name}; with --features, features that are whole stay and the same "
        "command resumes\n"
    )


def test_a_signal_of_another_kind_lets_what_is_tidied_up_be_tidied_up() -> None:
    """Who stops a group of processes, a terminal and then a scheduler, sends both."""
    command = [sys.executable, "-c", WAITING, "tidying"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "tidying\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGINT, "tidied\n")
    assert err.startswith("rerankvpr: eval: stopped by SIGINT; ")
    assert err.count("\n") == 1


def test_a_signal_while_the_last_output_waits_for_its_reader_ends_it_with_the_line() -> None:
    command = [sys.executable, "-c", WAITING, "flushing"]
    env = {**ENV, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "full\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert err.startswith("rerankvpr: eval: stopped by SIGINT; ")
    assert err.count("\n") == 1


def test_once_a_verb_is_over_no_signal_ends_the_process_that_ends_with_it() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        for ends, after in ((False, before), (True, [signal.SIG_IGN] * 2)):
            with one_line_when_interrupted("eval", ends=ends):
                pass
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == after
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_a_signal_that_comes_when_all_is_done_changes_nothing() -> None:
    command = [sys.executable, "-c", WAITING, "done"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() + process.stdout.readline() == "begun\ndone\n"
    process.terminate()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 3


def test_a_verb_that_hangs_in_c_code_ends_all_the_same() -> None:
    """As in a collective or a search: a signal handler of Python waits for the call to return."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "c"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    began = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        ("ValueError('data.shards: no such folder')", 2, "data.shards: no such folder"),
        ("KeyError('files')", 1, "KeyError: no 'files', at"),
        ("RecursionError()", 1, "RecursionError: nested too deeply, at"),
        ("MemoryError('Unable to allocate 7 TiB')", 1, "out of memory (Unable to allocate 7 TiB), at"),
        ("RuntimeError('can\\'t start new thread')", 1, "out of memory, or at the system's limit of threads (can't"),
        ("RuntimeError('[enforce fail] . DefaultCPUAllocator: can\\'t allocate memory')", 1, "out of memory ("),
        ("RuntimeError('gloo: Connection closed by peer [10.0.0.1]')", 1, "another rank is gone"),
        ("Exception('a\\nb\\nc')", 1, "Exception: a, at"),
    ],
)
def test_an_error_of_any_kind_is_one_line(raised: str, status: int, words: str, tmp_path: Path) -> None:
    done = run("-c", RAISING, raised, env={**ENV, "TMPDIR": str(tmp_path)})
    assert done.returncode == status
    assert done.stderr.startswith("rerankvpr: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    kept = list(tmp_path.glob("rerankvpr-error-*.txt"))
    assert len(kept) == (status == 1)
    assert all("Traceback" in file.read_text() and str(file) in done.stderr for file in kept)


def test_a_traceback_is_shown_when_asked_for() -> None:
    done = run("-c", RAISING, "KeyError('files')", env={**ENV, "RERANKVPR_TRACEBACK": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def help_into(shell: str) -> list[tuple[int, str]]:
    """Status and stderr of commands that print, their streams as the shell says."""
    commands = (["--help"], ["train", "demo", "--help"])
    ended = [run("-m", "rerankvpr", *argv, shell=f"{shell}; exit ${{PIPESTATUS[0]}}") for argv in commands]
    return [(done.returncode, done.stderr) for done in ended]


@pytest.mark.parametrize("shell", [">&-", "<&- >&- 2>&-", "| head -c 1"])
def test_nobody_who_listens_is_no_error(shell: str) -> None:
    assert help_into(shell) == [(0, ""), (0, "")]


def test_a_stream_that_is_full_is_one_line() -> None:
    for status, said in help_into(">/dev/full"):
        assert status == 2
        assert re.fullmatch(r"rerankvpr: (stdout: )?No space left on device.* is (there|not whole)\n", said)


def test_a_terminal_without_unicode_ends_nothing() -> None:
    code = "from rerankvpr import prepare_streams; prepare_streams(); print('\\U0001f3c3 z\\udcff')"
    done = run("-c", code, env={**ENV, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout) == (0, "\\U0001f3c3 z\\udcff\n")
