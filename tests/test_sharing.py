"""Forks that share tests run each once, with the fixtures of its module, and one process says what all found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ranks import ROOT

CONFTEST = """
import pytest
from tests.sharing import Sharing, add_options as pytest_addoption

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long")
    config.pluginmanager.register(Sharing(config.getoption("--processes")))

@pytest.fixture(scope="session")
def session(tmp_path_factory):
    with open("log.txt", "a") as log:
        yield log
        print("session ends", file=log)
"""
MODULE = """
import pytest, time, warnings

@pytest.fixture(scope="module", autouse=True)
def module(session):
    yield
    print("{name} ends", file=session, flush=True)

def test_quick(session):
    print("{name} quick", file=session, flush=True)

@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_slow(session, world_size):
    time.sleep(0.1)
    print("{name} slow", world_size, file=session, flush=True)
    print("said by {name}", world_size)
    if ("{name}", world_size) == ("b", 2):
        warnings.warn("a warning of b")
    assert ("{name}", world_size) != ("c", 4)
"""
STARTS = """
import signal, subprocess, time
from pathlib import Path
import pytest

@pytest.fixture
def child():
    process = subprocess.Popen(["sleep", "300"])
    Path("child.txt").write_text(f"{process.pid}")
    yield
    process.kill()
    process.wait()

@pytest.mark.slow
def test_starts(child):
    {before}
    Path("begun.txt").touch()
    time.sleep(200)
"""
FAILS = """
import time
from pathlib import Path
import tests.sharing

tests.sharing.ENDS_S = {ends_s}

def test_fails():
    while not Path("begun.txt").exists():
        time.sleep(0.01)
    assert False
"""
DIES = """
import os

def test_before():
    pass

def test_dies():
    os._exit(7)
"""


def shared(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """pytest over the modules of a folder, in two forks."""
    (folder / "conftest.py").write_text(CONFTEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--processes", "2", "--rootdir", ".", "-rA"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, *flags], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_each_test_runs_once_and_one_process_says_what_all_found(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"test_{name}.py").write_text(MODULE.replace("{name}", name))
    done = shared(tmp_path)
    assert done.returncode == 1, done.stdout
    lines = (tmp_path / "log.txt").read_text().splitlines()
    ran = [line for line in lines if "ends" not in line]
    assert sorted(ran) == sorted(f"{name} {what}" for name in "abcdef" for what in ("quick", "slow 2", "slow 4"))
    assert lines.count("session ends") == 2
    for name in "abcdef":  # once after its quick tests, once after each of the checks
        assert lines.count(f"{name} ends") == 3
    assert "1 failed, 17 passed, 1 warning" in done.stdout
    assert "FAILED test_c.py::test_slow[4] - AssertionError" in done.stdout
    assert "UserWarning: a warning of b" in done.stdout
    for name in "abcdef":
        for world_size in (2, 4):
            assert done.stdout.count(f"said by {name} {world_size}\n") == 1


def test_a_process_that_dies_is_named_with_the_test_that_ran(tmp_path: Path) -> None:
    (tmp_path / "test_dies.py").write_text(DIES)
    done = shared(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "ended with status 7, in test_dies.py::test_dies" in done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(("before", "ends_s", "is_left"), [("", 60, False), ("signal.signal(2, 1)", 0.5, True)])
def test_processes_that_stop_end_what_their_tests_have_started(
    before: str, ends_s: float, is_left: bool, tmp_path: Path
) -> None:
    """By their fixtures; one that does not stop is killed, and what it has started is left."""
    (tmp_path / "test_starts.py").write_text(STARTS.replace("{before}", before))
    (tmp_path / "test_fails.py").write_text(FAILS.replace("{ends_s}", str(ends_s)))
    done = shared(tmp_path, "-x")
    assert "stopping after 1 failures" in done.stdout
    child = int((tmp_path / "child.txt").read_text())
    assert psutil.pid_exists(child) == is_left
    if is_left:
        os.kill(child, signal.SIGKILL)
