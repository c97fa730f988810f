"""Processes that share tests run each once, with the fixtures of its module, and end with what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT

CONFTEST = """
import pytest
from tests.sharing import Sharing, add_options as pytest_addoption

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long")
    config.pluginmanager.register(Sharing(config.getoption("--share"), config.getoption("--slow-first")))

@pytest.fixture(scope="session")
def session(tmp_path_factory):
    with open("log.txt", "a") as log:
        yield log
        print("session ends", file=log)
"""
MODULE = """
import pytest, time

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
    assert ("{name}", world_size) != ("c", 4)
"""


def test_each_test_runs_once_in_one_of_two_processes(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in "abcdef":
        (tmp_path / f"test_{name}.py").write_text(MODULE.replace("{name}", name))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--share", "shared", "--rootdir", "."]
    runs = [
        subprocess.Popen(
            [*command, *flags], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        for flags in ((), ("--slow-first",))
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], said
    lines = (tmp_path / "log.txt").read_text().splitlines()
    ran = [line for line in lines if "ends" not in line]
    assert sorted(ran) == sorted(f"{name} {what}" for name in "abcdef" for what in ("quick", "slow 2", "slow 4"))
    assert lines.count("session ends") == 2
    for name in "abcdef":  # once after its quick tests, once after each of the checks
        assert lines.count(f"{name} ends") == 3
    durations = [json.loads(file.read_text()) for file in (tmp_path / "shared").glob("durations-*.json")]
    assert len(durations) == 2
    assert len([what for one in durations for _, what in one if what.startswith("call")]) >= 12
    assert sum("slowest 10 of 2 processes" in text for text in said) >= 1
