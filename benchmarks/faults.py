"""Effective training time under injected failures, and what a restart takes, by part.

`python -m benchmarks.faults` trains a small ViT on the rendered town with two ranks, once per scenario, and sends
SIGKILL every `--every` seconds. While the agent lives, it starts the ranks again from its warm fork server; with the
agent killed too, the same command is run again at once, which imports everything anew. Effective training time is what
the steps that were kept take in a training that nobody kills and that saves nothing (their number times its mean
seconds from step to step), as a share of all time, the first start included; the rest is restarts, checkpoints and
steps done twice. That training runs before and after each scenario, and the mean of both is its unit: machines have
faster and slower minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro
import yaml

from benchmarks.report import print_table, write_json
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town
from trainer.checkpoint_folder import newest_valid

RANKS = 2
WARM_UP = 20  # steps before those that are timed
NO_SAVES = ("--trainer.checkpoint-every-s", "0", "--trainer.mean-time-between-failures-s", "0")


@dataclass(frozen=True)
class Scenario:
    """Who is killed, and how ranks are started."""

    name: str
    victims: str  # all ranks, one rank, agent
    start_method: str = "forkserver"


SCENARIOS = {
    "all": Scenario("all ranks killed", "all ranks"),
    "one": Scenario("one rank killed", "one rank"),
    "agent": Scenario("agent and ranks killed", "agent"),
    "cold": Scenario("all ranks killed, cold starts", "all ranks", "spawn"),
}


@dataclass(frozen=True)
class Options:
    """Effective training time under SIGKILL at an interval, and restarts by part."""

    seconds: float = 600
    """How long to train in each scenario."""
    every: float = 60
    """Seconds from one failure to the next."""
    unbroken: float = 30
    """Seconds of training that nobody kills, before and after each scenario, for the time of a step."""
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    """Of all, one, agent, cold."""
    json: Path | None = None
    """File for the figures."""


@dataclass
class Outcome:
    """What one scenario left."""

    seconds: float
    kept: int
    done: int
    outages_s: list[float] = field(default_factory=list)  # from each kill to the end of the first step after it
    parts: list[dict[str, float]] = field(
        default_factory=list
    )  # of each start but the first, as the training logs them

    def figures(self, unbroken_step_s: float) -> dict[str, float]:
        """By name; medians over restarts. `agent` is the part before the processes of the ranks begin."""
        outage = _median(self.outages_s)
        parts = {name: _median([one[name] for one in self.parts if name in one]) for name in _names(self.parts)}
        return {
            "failures": float(len(self.outages_s)),
            "seconds": self.seconds,
            "steps_kept": float(self.kept),
            "steps_done": float(self.done),
            "unbroken_step_s": unbroken_step_s,
            "effective_training_time": self.kept * unbroken_step_s / self.seconds,
            "steps_lost": 1 - self.kept / max(1, self.done),
            "restart_s": outage,
            "restart_agent_s": outage - parts.pop("restart_s", outage),
            **parts,
        }


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _names(parts: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for one in parts for name in one))


def prepare(folder: Path, every: float) -> Path:
    """Shards and a recipe that never ends."""
    render_town(folder / "town", Town(seed=3, places=48, views=4, held_out_places=0), processes=1)
    write_shards(read_gsv_cities(folder / "town" / "train", min_images_per_place=4), folder / "shards")
    recipe: dict[str, Any] = {
        "name": "faults",
        "data": {
            "shards": str(folder / "shards"),
            "places_per_batch": 16,
            "images_per_place": 4,
            "image_size": 84,
            "composition": "mixed",
            "decode_threads": 1,
        },
        "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem"},
        "memory": {"size": 512, "start_epoch": 1},
        "trainer": {
            "epochs": 100_000,
            "validate_every_epochs": 0,
            "checkpoint_every_steps": 1_000_000,
            "checkpoint_every_s": "auto",
            "mean_time_between_failures_s": every,
        },
        "tracking": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, output: Path, start_method: str, *flags: str) -> subprocess.Popen[bytes]:
    """The training, from its newest checkpoint."""
    command = [sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", str(RANKS), "--max-restarts", "10000"]
    command += ["--start-method", start_method, "--", "train", str(recipe), "--output", str(output), "--resume", *flags]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes], victims: str) -> None:
    """SIGKILL to one rank, to all ranks, or to the launcher and all that it has started."""
    agent = psutil.Process(process.pid)
    family = agent.children(recursive=True)
    ranks = [one for one in family if {"train", "trainer"} & set(_command(one))]
    chosen = {"one rank": ranks[-1:], "all ranks": ranks, "agent": [*family, agent]}[victims]
    for victim in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    if victims == "agent":
        process.wait()


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def step_lines(output: Path) -> list[dict[str, float]]:
    """The whole lines of the training's metrics so far."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}") and "train/step_s" in line]


def written(output: Path, start: int) -> bytes:
    """The training's metrics from a byte on."""
    metrics = output / "metrics.jsonl"
    if not metrics.exists():
        return b""
    with metrics.open("rb") as file:
        file.seek(start)
        return file.read()


def unbroken_step_s(recipe: Path, output: Path, seconds: float) -> float:
    """Mean seconds from one step to the next in `seconds` of a training that is not killed and saves nothing."""
    process = start(recipe, output, "forkserver", *NO_SAVES)
    while len(step_lines(output)) <= WARM_UP:
        if process.poll() is not None:
            sys.exit(f"the training ended by itself:\n{output.with_suffix('.log').read_text()[-3000:]}")
        time.sleep(0.5)
    time.sleep(seconds)
    lines = step_lines(output)[WARM_UP:]
    kill(process, "agent")
    return (lines[-1]["time_ms"] - lines[0]["time_ms"]) / 1000 / (len(lines) - 1)


def run(recipe: Path, output: Path, scenario: Scenario, options: Options) -> Outcome:
    """One training under one scenario; kills come at multiples of `every` after the first start."""
    began = time.monotonic()
    process = start(recipe, output, scenario.start_method)
    killed_at: float | None = None
    size_before, outages_s = 0, []
    next_kill = began + options.every
    while (now := time.monotonic()) < began + options.seconds:
        if process.poll() is not None:
            sys.exit(f"the training ended by itself:\n{output.with_suffix('.log').read_text()[-3000:]}")
        if killed_at is not None and b"train/restart_s" in written(output, size_before):
            outages_s.append(time.monotonic() - killed_at)
            killed_at = None
        if now >= next_kill and killed_at is None and b"train/restart_s" in written(output, 0):
            killed_at = time.monotonic()
            kill(process, scenario.victims)
            size_before = len(written(output, 0))
            if scenario.victims == "agent":
                process = start(recipe, output, scenario.start_method)
            while next_kill <= now:
                next_kill += options.every
        time.sleep(0.05)
    seconds = time.monotonic() - began
    kill(process, "agent")
    steps = step_lines(output)
    _first, *restarts = [line for line in steps if "train/restart_s" in line] or [{}]
    found, _ = newest_valid(output / "checkpoints")
    return Outcome(
        seconds,
        kept=int(found.name.removeprefix("step-")) if found else 0,
        done=len(steps),
        outages_s=outages_s,
        parts=[
            {name.removeprefix("train/"): value for name, value in line.items() if name.startswith("train/restart_")}
            for line in restarts
        ],
    )


def main() -> None:
    """Trains, kills, and prints what was kept."""
    options = tyro.cli(Options, prog="python -m benchmarks.faults")
    wrong = [name for name in options.scenarios if name not in SCENARIOS]
    if wrong:
        sys.exit(f"--scenarios {wrong[0]}: expected some of {', '.join(SCENARIOS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder, options.every)
        before = unbroken_step_s(recipe, folder / "unbroken", options.unbroken)
        results = {}
        for key in options.scenarios:
            outcome = run(recipe, folder / key, SCENARIOS[key], options)
            after = unbroken_step_s(recipe, folder / f"unbroken-after-{key}", options.unbroken)
            results[key], before = outcome.figures((before + after) / 2), after
    rows = [
        (figure, *(f"{one[figure]:.3f}" if figure in one else "" for one in results.values()))
        for figure in _names(list(results.values()))
    ]
    title = f"{RANKS} ranks, SIGKILL every {options.every:g} s for {options.seconds:g} s"
    print_table(title, ("figure", *(SCENARIOS[key].name for key in results)), rows)
    if "all" in results and "cold" in results:
        warm, cold = (results[key]["effective_training_time"] for key in ("all", "cold"))
        print(f"effective training time, warm over cold starts: {warm / cold:.2f}" if cold else "no cold step was kept")
    write_json(options.json, {f"{key}/{name}": value for key, one in results.items() for name, value in one.items()})


if __name__ == "__main__":
    main()
