"""An evaluation in MLflow: a run under the training's where the store knows that one, or one of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console

from eval.evaluate import Result
from eval.report.tables import write_csv, write_results

_NOT_IN_NAMES = re.compile(r"[^\w./ -]")  # what MLflow refuses in a metric's name


def log_evaluation(
    uri: str,
    experiment: str,
    results: list[Result],
    *,
    model: str,
    params: dict[str, object],
    out: Path | None,
    parent: str | None,
    console: Console,
) -> str | None:
    """Logs parameters, recalls, timings, results and pictures; returns the run's id, None if the store failed.

    `parent` is the training's run: where the store at `uri` has it, this run is nested under it and lies in its
    experiment, otherwise in `experiment`. A store that fails is reported in one line; the results stay where they are.
    """
    try:
        return _log(uri, experiment, results, model, params, out, parent, console)
    except Exception as error:  # noqa: BLE001 - whatever the store raises, an evaluation must not end of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        console.print(f"[yellow]MLflow does not answer ({reason}); this evaluation is not in it", soft_wrap=True)
        return None


def _log(
    uri: str,
    experiment: str,
    results: list[Result],
    model: str,
    params: dict[str, object],
    out: Path | None,
    parent: str | None,
    console: Console,
) -> str:
    # A server that is down costs seconds, not the minutes of MLflow's own retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=uri)
    tags = {"mlflow.source.name": "rerankvpr eval"}
    experiment_id = _experiment_of(client, parent) if parent else None
    if experiment_id:
        tags["mlflow.parentRunId"] = str(parent)
    else:
        if parent:
            console.print("MLflow: the training's run is not in this store; the evaluation gets a run of its own")
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    run: str = client.create_run(experiment_id, run_name=f"eval {model}", tags=tags).info.run_id
    texts = {"model": model} | {name: json.dumps(value, default=str) for name, value in params.items()}
    now = int(time.time() * 1000)
    metrics = [
        Metric(f"eval/{_NOT_IN_NAMES.sub('_', result.name)}/{name}", value, now, 0)
        for result in results
        for name, value in result.metrics().items()
    ]
    client.log_batch(run, params=[Param(name, text[:500]) for name, text in texts.items()])
    for start in range(0, len(metrics), 1000):
        client.log_batch(run, metrics=metrics[start : start + 1000])
    with tempfile.TemporaryDirectory() as name:
        write_results(Path(name) / "results.json", results, model=model)
        write_csv(Path(name) / "results.csv", results)
        client.log_artifacts(run, name)
    for pictures in ("pictures", "sweeps"):
        if out and (out / pictures).is_dir():
            client.log_artifacts(run, str(out / pictures), pictures)
    client.set_terminated(run)
    return run


def _experiment_of(client: object, run: str) -> str | None:
    """The experiment of a run; None where the store does not have it."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        return str(client.get_run(run).info.experiment_id)  # type: ignore[attr-defined]
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise
