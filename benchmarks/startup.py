"""Seconds until something happens: `--help` of each verb, first and warm starts of a training beside torchrun's own.

`python -m benchmarks.startup` times `rerankvpr VERB --help`, and trainings of a small ViT at each number of ranks: from
the command to the end of the first step, and from SIGKILL to all ranks to the end of the first step after it, by
`rerankvpr launch` and by `torchrun -m trainer`. Memory is that of the ranks, and of the fork server, after the first
step: RSS counts a page that is shared in each process, PSS divides it among them.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from benchmarks.faults import kill, prepare, step_lines
from benchmarks.report import print_table, write_json
from launch.cli import VERBS

PATIENCE_S = 600
GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Seconds of help, of first and of warm starts, beside torchrun's; memory of ranks."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks."""
    restarts: int = 5
    """Restarts that the median is of."""
    helps: int = 3
    """Times that each --help is run."""
    json: Path | None = None
    """File for the figures."""


def seconds_of(command: list[str]) -> float:
    """Seconds that a command takes; it has to end well."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def help_seconds(times: int) -> dict[str, float]:
    """The median for Python that does nothing, and for each verb's help."""
    commands = {"(python -c pass)": ["-c", "pass"], "--help": ["-m", "rerankvpr", "--help"]}
    commands |= {verb: ["-m", "rerankvpr", verb, "--help"] for verb in VERBS}
    return {
        name: statistics.median(seconds_of([sys.executable, *rest]) for _ in range(times))
        for name, rest in commands.items()
    }


def start(recipe: Path, output: Path, launcher: str, ranks: int) -> subprocess.Popen[bytes]:
    """A training that restarts, by our launcher or by torchrun as it is."""
    counts = ["--nproc-per-node", str(ranks), "--max-restarts", "10000"]
    if launcher == "launch":
        command = ["-m", "rerankvpr", "launch", *counts, "--", "train"]
    else:
        command = ["-m", "torch.distributed.run", "--standalone", *counts, "-m", "trainer"]
    command += [str(recipe), "--output", str(output), "--resume", "--data.places-per-batch", "16"]
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )


def until_started(process: subprocess.Popen[bytes], output: Path, starts: int) -> float:
    """Seconds until the training has been started `starts` times and has done a step each time."""
    began = time.perf_counter()
    while sum("train/restart_s" in line for line in step_lines(output)) < starts:
        if process.poll() is not None or time.perf_counter() - began > PATIENCE_S:
            sys.exit(f"the training did not start:\n{output.with_suffix('.log').read_text()[-3000:]}")
        time.sleep(0.01)
    return time.perf_counter() - began


def memory(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """GiB of all processes of a training but the agent, which imports the same in both: RSS and PSS in sum."""
    rss, pss = 0.0, 0.0
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            info = one.memory_full_info()
            rss, pss = rss + info.rss, pss + info.pss
    return {"rss_gib": rss / GIB, "pss_gib": pss / GIB}


def starts(recipe: Path, folder: Path, launcher: str, ranks: int, restarts: int) -> dict[str, float]:
    """First start, median restart and memory of one launcher at one number of ranks."""
    output = folder / f"{launcher}{ranks}"
    began = time.perf_counter()
    process = start(recipe, output, launcher, ranks)
    try:
        until_started(process, output, 1)
        figures = {"first_s": time.perf_counter() - began}
        figures |= memory(process)
        taken = []
        for number in range(restarts):
            kill(process, "all ranks")
            taken.append(until_started(process, output, number + 2))
    finally:
        kill(process, "agent")
    return figures | {"restart_s": statistics.median(taken)}


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options, prog="python -m benchmarks.startup")
    helps = help_seconds(options.helps)
    print_table("seconds of --help, median", ("verb", "s"), [(name, f"{s:.2f}") for name, s in helps.items()])
    figures = {f"help/{name}": seconds for name, seconds in helps.items()}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        recipe = prepare(Path(name), every=3600)
        for ranks in options.ranks:
            ours, theirs = (
                starts(recipe, Path(name), launcher, ranks, options.restarts) for launcher in ("launch", "torchrun")
            )
            for what in ours:
                ratio = theirs[what] / ours[what]
                rows.append((f"{ranks} ranks, {what}", f"{ours[what]:.2f}", f"{theirs[what]:.2f}", f"{ratio:.2f}"))
                figures |= {f"{ranks}/launch/{what}": ours[what], f"{ranks}/torchrun/{what}": theirs[what]}
    columns = ("to the end of the first step", "launch", "torchrun -m trainer", "torchrun / launch")
    print_table("starts, and memory of ranks and fork server", columns, rows)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
