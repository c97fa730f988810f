"""An MLflow store whose tables are there: to make them takes more than a second of each test that has its own."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from tests.forked import scratch


def new_store(file: Path) -> str:
    """Makes `file`, a store without runs, and returns its URI; the tables are made at the first call of all tests."""
    made = scratch() / "mlflow.db"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not made.exists():
            from mlflow import MlflowClient

            partial = made.with_suffix(".partial")
            MlflowClient(f"sqlite:///{partial}").search_experiments()
            partial.rename(made)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, file)
    return f"sqlite:///{file}"
