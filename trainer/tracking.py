"""Metrics, parameters and pictures: to `metrics.jsonl` always, to MLflow on rank 0 while it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from configs.schema import Recipe

FLUSH_EVERY_S = 5.0


class Tracker:
    """One MLflow run for one training, resumed by its id; a store that fails is reported once and left alone."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, *, run_id: str | None, active: bool) -> None:
        self.console = console
        self.run_id = run_id
        self.active = active
        self.client: Any = None
        self.pending: list[Any] = []
        self.flushed = time.monotonic()
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.jsonl = (folder / "metrics.jsonl").open("a")
        if recipe.tracking.enabled:
            self._guard(lambda: self._open(recipe))

    def _open(self, recipe: Recipe) -> None:
        import logging
        import os

        # A server that is down costs seconds, not the minutes of MLflow's own retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        import mlflow
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=recipe.tracking.uri)
        if self.run_id is None:
            experiment = client.get_experiment_by_name(recipe.tracking.experiment)
            experiment_id = (
                experiment.experiment_id if experiment else client.create_experiment(recipe.tracking.experiment)
            )
            run = client.create_run(experiment_id, run_name=recipe.name, tags={"mlflow.source.name": "rerankvpr train"})
            self.run_id = run.info.run_id
            params = {k: str(v)[:500] for k, v in recipe.as_flat().items() if k != "tracking.uri"}
            client.log_batch(self.run_id, params=[mlflow.entities.Param(k, v) for k, v in params.items()])
        else:
            client.update_run(self.run_id, status="RUNNING")
        self.client = client

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever the store raises, a training must not end of it
            self.client = None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.console.print(f"[yellow]MLflow does not answer ({reason}); metrics go to metrics.jsonl alone")

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Logs values of one step; MLflow gets them in batches."""
        if not self.active:
            return
        self.jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self.jsonl.flush()
        if self.client is not None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self.pending += [Metric(name, float(value), now, step) for name, value in values.items()]
            if time.monotonic() - self.flushed > FLUSH_EVERY_S:
                self.flush()

    def flush(self) -> None:
        """Sends what is waiting."""
        self.flushed = time.monotonic()
        while self.pending and self.client is not None:
            batch, self.pending = self.pending[:1000], self.pending[1000:]
            self._guard(lambda batch=batch: self.client.log_batch(self.run_id, metrics=batch))  # type: ignore[misc]

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Stores a file with the run."""
        if self.active and self.client is not None:
            self._guard(lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def close(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        if not self.active:
            return
        self.flush()
        self.jsonl.close()
        if self.client is not None:
            self._guard(lambda: self.client.set_terminated(self.run_id, status))


def open_command(uri: str) -> str:
    """The command, or the address, that shows a store's runs in a browser; without user name or password."""
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    return f"mlflow ui --backend-store-uri {uri}"
