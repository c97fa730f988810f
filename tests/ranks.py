"""Runs a test module's `check_*` functions in real gloo processes, all of them in one group per world size.

A module writes `def check_xyz() -> None` functions that assert on every rank, and at its end
`test_on_ranks = on_ranks(__file__)`; pytest then shows one test for each check at world sizes 1, 2 and 4.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORLD_SIZES = (1, 2, 4)
GROUP_TIMEOUT_S = 300
COLLECTIVE_TIMEOUT_S = 60


def check_names(file: str) -> list[str]:
    """Names of the `check_*` functions of a test file, in source order."""
    lines = Path(file).read_text().splitlines()
    return [line[4 : line.index("(")] for line in lines if line.startswith("def check_")]


@functools.cache
def run_checks(module: str, world_size: int) -> dict[str, list[str]]:
    """Errors of each check by name, one text a failing rank; kills the whole group after `GROUP_TIMEOUT_S`."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        procs = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", module, folder, str(rank), str(world_size)],
                cwd=ROOT,
                env=env,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=GROUP_TIMEOUT_S)
        output = []
        try:
            for proc in procs:
                left = (deadline - datetime.datetime.now()).total_seconds()
                output.append(proc.communicate(timeout=max(left, 0.1))[0])
        except subprocess.TimeoutExpired:
            output.append(f"no end after {GROUP_TIMEOUT_S} s")
        finally:
            for proc in procs:
                if proc.poll() is None:
                    os.killpg(proc.pid, signal.SIGKILL)
                    proc.wait()
        errors: dict[str, list[str]] = {}
        for rank in range(world_size):
            path = Path(folder) / f"rank{rank}.json"
            done: dict[str, str | None] = json.loads(path.read_text()) if path.exists() else {}
            for name in check_names(str(ROOT / (module.replace(".", "/") + ".py"))):
                error = done.get(name, f"did not run; output of the group:\n{'---'.join(output)[-3000:]}")
                if error:
                    errors.setdefault(name, []).append(f"rank {rank} of {world_size}: {error}")
        return errors


def on_ranks(file: str, world_sizes: tuple[int, ...] = WORLD_SIZES) -> Callable[..., None]:
    """A pytest test over all checks of `file` and `world_sizes`."""
    module = f"tests.{Path(file).stem}"

    @pytest.mark.parametrize("world_size", world_sizes)
    @pytest.mark.parametrize("check", check_names(file))
    def test(check: str, world_size: int) -> None:
        errors = run_checks(module, world_size).get(check, [])
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)

    return test


def _main() -> None:
    module, folder, rank, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    tests = importlib.import_module(module)
    results: dict[str, str | None] = {}
    for name in check_names(str(tests.__file__)):
        torch.manual_seed(0)
        try:
            getattr(tests, name)()
            results[name] = None
        except BaseException:  # noqa: BLE001 - reported to pytest, and the group ends: its ranks no longer agree
            results[name] = traceback.format_exc()
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
        failed = torch.tensor(float(results[name] is not None))
        dist.all_reduce(failed)
        if failed:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
