"""A real MLflow server that tests start, kill and start again."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from rich.console import Console

from configs.schema import Recipe
from tests.ports import free_port
from tests.stores import new_store
from trainer.tracking import Tracker

PATIENCE_S = 900.0  # for what a slow machine does at last; a process that has ended is noticed at once


class Server:
    """`mlflow server` on a port of its own, with SQLite and a folder of artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = new_store(folder / "server.db")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.folder.mkdir(exist_ok=True)
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", self.database, "--artifacts-destination", str(self.folder / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a process less to wait for
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *stores],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env=env,
            )
        wait_until(self.answers, PATIENCE_S)

    def answers(self) -> bool:
        """Whether it serves; fails if its process has ended."""
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as reply:
            return reply.status == 200
        return False

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def wait_until(done: Callable[[], object], limit_s: float = 30) -> None:
    """Returns once `done` is true; fails after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def recipe_for(uri: str, folder: Path, **keys: Any) -> Recipe:
    """A recipe whose experiment is the test's folder."""
    section = {"uri": uri, "experiment": folder.parent.name, "system_metrics_every_s": 0, **keys}
    return Recipe.model_validate({"name": folder.name, "output": str(folder), "tracking": section})


def track(
    recipe: Recipe, said: io.StringIO | None = None, *, training: str | None = None, run_id: str | None = None
) -> Tracker:
    console = Console(file=said or io.StringIO(), width=1000)
    facts = {"world_size": "1"}
    return Tracker(recipe, recipe.output, console, training=training, run_id=run_id, active=True, facts=facts)


def steps_of(client: MlflowClient, run_id: str | None, name: str = "train/loss") -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def runs_of(client: MlflowClient, recipe: Recipe) -> list[Any]:
    """The trainings of an experiment; evaluations are runs under them."""
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def training_that_never_ends(recipe: Recipe) -> None:
    tracker = Tracker(recipe, recipe.output, Console(), training=None, run_id=None, active=True)
    for step in range(5):
        tracker.metrics({"train/loss": 1.0}, step)
    while True:
        time.sleep(0.1)
        tracker.metrics({"train/loss": 1.0}, 5)
