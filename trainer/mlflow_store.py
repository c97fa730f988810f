"""What a client of MLflow needs to know of its stores: quiet output, names that they take, what is deleted there."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from typing import Any

_REFUSED_IN_NAMES = re.compile(r"[^\w./ :-]")


class DeletedError(Exception):
    """An experiment or run that is deleted in the store, which only its user can undo; the text says how."""


def open_client(uri: str, *, retries: int) -> Any:
    """A client of the store at `uri`, quiet and bounded in time; `retries` are its own, of each request."""
    quiet_mlflow(retries=retries)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def quiet_mlflow(*, retries: int) -> None:
    """Bounds how long MLflow's client waits, keeps its logs to errors and its links and emoji out of our output."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow  # noqa: F401 - sets levels of its own

    for name in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def metric_name(name: str) -> str:
    """A metric's name as MLflow takes it: what it refuses becomes `_`."""
    name = _REFUSED_IN_NAMES.sub("_", name)[:250]
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return posixpath.join(*parts) if parts else "_"


def active_experiment(client: Any, name: str) -> str:
    """The id of an experiment, created where there is none. Raises DeletedError where it is in the store's trash."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another training was faster
    if found.lifecycle_stage != "active":
        raise DeletedError(
            f"experiment {name!r} is deleted in MLflow; `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}` brings it back, or give another --tracking.experiment"
        )
    return str(found.experiment_id)


def check_active(client: Any, run: Any) -> None:
    """Raises DeletedError where a run, or its experiment, is in the store's trash."""
    info = run.info
    if info.lifecycle_stage != "active":
        raise DeletedError(
            f"run {info.run_id} is deleted in MLflow; `mlflow runs restore --run-id {info.run_id}` brings it back"
        )
    experiment = client.get_experiment(info.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise DeletedError(
            f"experiment {experiment.name!r} of run {info.run_id} is deleted in MLflow; `mlflow experiments restore "
            f"--experiment-id {info.experiment_id}` brings it back"
        )
