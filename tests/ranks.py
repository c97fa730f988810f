"""Runs the `check_*` functions of test modules in real gloo processes, all of them in one group per world size.

A module writes `def check_xyz() -> None` functions that assert on every rank, and at its end
`test_on_ranks = on_ranks(__file__)`; pytest then shows one test for each check at world sizes 1, 2 and 4. Starting
processes costs far more than the checks, so the first of these tests runs the checks of all modules collected.
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
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORLD_SIZES = (1, 2, 4)
GROUP_TIMEOUT_S = 900
COLLECTIVE_TIMEOUT_S = 60


MODULES: list[str] = []


def check_names(module: str) -> list[str]:
    """Names of the `check_*` functions of a test module, in source order."""
    lines = (ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines()
    return [line[4 : line.index("(")] for line in lines if line.startswith("def check_")]


@functools.cache
def run_checks(world_size: int) -> dict[str, list[str]]:
    """Errors by `module.check`, one text a failing rank; kills the whole group after `GROUP_TIMEOUT_S`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        outputs = [(folder / f"rank{rank}.txt").open("w") for rank in range(world_size)]
        procs = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", name, str(rank), str(world_size), *MODULES],
                cwd=ROOT,
                env=env,
                start_new_session=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        deadline = time.monotonic() + GROUP_TIMEOUT_S
        while any(proc.poll() is None for proc in procs) and time.monotonic() < deadline:
            time.sleep(0.05)
        for proc, output in zip(procs, outputs, strict=True):
            if proc.poll() is None:
                os.killpg(proc.pid, signal.SIGKILL)
                proc.wait()
                output.write(f"killed after {GROUP_TIMEOUT_S} s")
            output.close()
        errors: dict[str, list[str]] = {}
        for rank in range(world_size):
            results = folder / f"rank{rank}.json"
            done: dict[str, str | None] = json.loads(results.read_text()) if results.exists() else {}
            printed = (folder / f"rank{rank}.txt").read_text()[-3000:]
            for check in (f"{module}.{name}" for module in MODULES for name in check_names(module)):
                error = done.get(check, f"did not run; the rank printed:\n{printed}")
                if error:
                    errors.setdefault(check, []).append(f"rank {rank} of {world_size}: {error}")
        return errors


def on_ranks(file: str, world_sizes: tuple[int, ...] = WORLD_SIZES) -> Callable[..., None]:
    """A pytest test over all checks of `file` and `world_sizes`."""
    module = f"tests.{Path(file).stem}"
    if module not in MODULES:
        MODULES.append(module)

    @pytest.mark.parametrize("world_size", world_sizes)
    @pytest.mark.parametrize("check", check_names(module))
    def test(check: str, world_size: int) -> None:
        errors = run_checks(world_size).get(f"{module}.{check}", [])
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)

    return test


def shared_folder() -> Path:
    """A temporary folder that all ranks know; called by a check, on every rank."""
    import torch.distributed as dist

    holder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(holder)
    return Path(holder[0])


def _main() -> None:
    folder, rank, world_size, modules = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # as torchrun does
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    results: dict[str, str | None] = {}
    for module, name in [(m, check) for m in modules for check in check_names(m)]:
        torch.manual_seed(0)
        error = None
        try:
            getattr(importlib.import_module(module), name)()
        except BaseException:  # noqa: BLE001 - reported to pytest, and the group ends: its ranks no longer agree
            error = traceback.format_exc()
        results[f"{module}.{name}"] = error
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
        failed = torch.tensor(float(error is not None))
        dist.all_reduce(failed)
        if failed:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
