"""A real MLflow server, two trainings at once, and the server killed and started again in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cluster.workplace import environment, losses
from trainer.ports import free_port


class Server:
    """An MLflow server with a SQLite store and an artifact folder, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.3)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that runs."""
    made = Server(tmp_path / "server")
    made.start()
    yield made
    made.kill()


def test_two_trainings_outlive_their_server(workplace: Path, server: Server) -> None:
    """Both end well, and each one's MLflow run has all of its steps."""
    steps, outputs = 1500, ("tracked_a", "tracked_b")  # enough to outlast the start of a server beside them
    command = [sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", "1", "--", "train"]
    flags = ("--tracking.uri", server.uri, "--trainer.max-steps", str(steps), "--eval.benchmarks")
    runs = []
    try:
        for output in outputs:
            argv = [*command, str(workplace / "recipe.yaml"), "--output", output, *flags]
            log = (workplace / f"{output}.log").open("wb")
            runs.append(subprocess.Popen(argv, cwd=workplace, env=environment(), stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 180
        while min(max(losses(workplace / output), default=0) for output in outputs) < 50:
            assert all(run.poll() is None for run in runs)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.kill()
        at_kill = [max(losses(workplace / output)) for output in outputs]
        time.sleep(2)
        assert all(run.poll() is None for run in runs)
        server.start()
        assert all(run.poll() is None for run in runs)
        texts = [
            (run.wait(300), (workplace / f"{output}.log").read_text())
            for run, output in zip(runs, outputs, strict=True)
        ]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert [status for status, _ in texts] == [0, 0], texts
    assert all(at < steps for at in at_kill)
    client = MlflowClient(server.uri)
    for output in outputs:
        state = json.loads((workplace / output / "checkpoints" / f"step-{steps:08d}" / "state.json").read_text())
        history = client.get_metric_history(state["mlflow_run_id"], "train/loss")
        assert {point.step: point.value for point in history} == losses(workplace / output)
        assert client.get_run(state["mlflow_run_id"]).info.status == "FINISHED"
