"""A real MLflow server, three trainings at once, and the server killed and started again in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.workplace import environment, losses, rerankvpr
from tests.mlflow_server import PATIENCE_S, Server, wait_until
from trainer.checkpoint_folder import pointed
from trainer.mlflow_sender import TRAINING_TAG, read_state
from trainer.stop_signal import REQUEUE_STATUS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that runs."""
    made = Server(tmp_path / "server")
    try:
        made.start()
        yield made
    finally:
        made.kill()


class Run:
    """A training in one process."""

    def __init__(self, workplace: Path, output: str, *flags: str) -> None:
        self.output, self._log = workplace / output, workplace / f"{output}.log"
        argv = [sys.executable, "-m", "rerankvpr", "train", str(workplace / "recipe.yaml"), "--output", output, *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, "--eval.benchmarks"], cwd=workplace, env=environment(), stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def text(self) -> str:
        """What it printed."""
        return self._log.read_text()

    @property
    def step(self) -> int:
        """The last step whose loss is in metrics.jsonl; 0 before the first."""
        return max(losses(self.output), default=0)

    def wait(self, done: Callable[[], object]) -> None:
        """Until `done`; fails if the training ends before."""

        def is_done() -> object:
            assert self.process.poll() is None, self.text
            return done()

        wait_until(is_done, PATIENCE_S)

    def go_on(self, steps: int) -> None:
        """Until it has done so many steps more."""
        reach = self.step + steps
        self.wait(lambda: self.step >= reach)

    def stop(self) -> dict[str, Any]:
        """Asks it to stop; the state in the checkpoint that it leaves."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == REQUEUE_STATUS, self.text
        return json.loads((pointed(self.output / "checkpoints" / "latest") / "state.json").read_text())

    def finish(self) -> None:
        """Waits for its end by itself."""
        assert self.process.wait(PATIENCE_S) == 0, self.text


def test_trainings_outlive_their_server(workplace: Path, server: Server) -> None:
    """One run each, with all steps: the server goes while `cut` and `through` run; `late` only begins."""
    store = ("--tracking.uri", server.uri)
    client = MlflowClient(server.uri)
    runs: list[Run] = []

    def train(output: str, *flags: str) -> Run:
        runs.append(Run(workplace, output, *store, *flags))
        return runs[-1]

    try:
        cut, through = train("cut"), train("through")
        for run in (cut, through):
            run.wait(lambda run=run: read_state(run.output).get("run_id"))
            run.go_on(20)
        server.kill()
        late = train("late")
        for run in (cut, through, late):
            run.wait(lambda run=run: "does not answer" in run.text)
            run.go_on(20)
        states = {run.output.name: run.stop() for run in (cut, late)}
        assert states["cut"]["mlflow_run_id"] == read_state(cut.output)["run_id"]
        assert states["late"]["mlflow_run_id"] is None
        server.start()
        through.wait(lambda: "answers again" in through.text)
        through.go_on(20)
        through.stop()
        more = {name: ("--trainer.max-steps", str(state["step"] + 30), "--resume") for name, state in states.items()}
        train("cut", *more["cut"]).finish()
        train("late_moved", *more["late"], str(pointed(late.output / "checkpoints" / "latest"))).finish()
    finally:
        for run in runs:
            run.process.kill()
            run.process.wait()
    for output in ("cut", "through", "late", "late_moved"):  # a stopped training waits 10 s for MLflow, no longer
        rerankvpr(workplace, "sync", output, *("--uri", server.uri))
    expected = {
        "cut": losses(cut.output),
        "through": losses(through.output),
        "late": losses(late.output) | losses(workplace / "late_moved"),
    }
    experiment = client.get_experiment_by_name("rerankvpr")
    found = {run.data.tags[TRAINING_TAG]: run for run in client.search_runs([experiment.experiment_id])}
    assert len(client.search_runs([experiment.experiment_id])) == len(found) == len(expected)
    for output, of_steps in expected.items():
        training = json.loads((workplace / output / "metrics.jsonl").open().readline())["training"]
        run = found.pop(training)
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert {point.step: point.value for point in history} == of_steps
        assert run.info.status == ("KILLED" if output == "through" else "FINISHED")
