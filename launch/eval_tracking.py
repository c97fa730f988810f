"""An evaluation in MLflow: a run under the training's where the store knows that one, or one of its own."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from configs.load import shareable
from configs.secrets import without_secrets
from eval.report.tables import write_csv, write_results
from eval.result import Result
from trainer.mlflow_page import LONGEST, NOTE, log_picture, prepare_experiment
from trainer.mlflow_store import DeletedError, active_experiment, check_active, metric_name, open_client
from trainer.tracking import cut, means_of, where_shown


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation was made of and came to; `out` is its folder of pictures."""

    model: str
    params: dict[str, object]
    results: list[Result]
    out: Path | None


def log_evaluation(
    uri: str, experiment: str, evaluation: Evaluation, *, parent: str | None, console: Console
) -> str | None:
    """Logs parameters, recalls, timings, results and pictures; returns the run's id, None if the store failed.

    `parent` is the training's run: where the store at `uri` has it, this run is nested under it and lies in its
    experiment, otherwise in `experiment`. A store that fails is reported in one line; the results stay where they are.
    """
    try:
        return _log(uri, experiment, evaluation, parent, console)
    except DeletedError as error:
        console.print(f"[yellow]{escape(str(error))}; this evaluation is not in it", soft_wrap=True)
        return None
    except Exception as error:  # noqa: BLE001 - whatever the store raises, an evaluation must not end of it
        reason = without_secrets(str(error).splitlines()[0]) if str(error) else type(error).__name__
        console.print(f"[yellow]MLflow does not answer ({reason}); this evaluation is not in it", soft_wrap=True)
        return None


def _log(uri: str, experiment: str, evaluation: Evaluation, parent: str | None, console: Console) -> str:
    model, results, out = evaluation.model, evaluation.results, evaluation.out
    client = open_client(uri, retries=2)
    from mlflow.entities import Metric, Param

    names = ", ".join(result.name for result in results)
    tags = {"mlflow.source.name": "rerankvpr eval", NOTE: _note(model, results)}
    experiment_id = _experiment_of(client, parent) if parent else None
    if experiment_id:
        tags["mlflow.parentRunId"] = str(parent)
    else:
        if parent:
            console.print("MLflow: the training's run is not in this store; the evaluation gets a run of its own")
        experiment_id = active_experiment(client, experiment)
    prepare_experiment(client, experiment_id)
    run: str = client.create_run(experiment_id, run_name=f"eval {names} of {model}", tags=tags).info.run_id
    texts = {"model": model} | {
        name: json.dumps(shareable(value), default=str) for name, value in evaluation.params.items()
    }
    now = int(time.time() * 1000)
    named = {f"eval/{result.name}/{name}": v for result in results for name, v in result.metrics().items()}
    named |= means_of([result.recalls() for result in results])
    metrics = [Metric(metric_name(name), value, now, 0) for name, value in named.items()]
    client.log_batch(run, params=[Param(name, cut(text)) for name, text in texts.items()])
    for start in range(0, len(metrics), 1000):
        client.log_batch(run, metrics=metrics[start : start + 1000])
    with tempfile.TemporaryDirectory() as name:
        write_results(Path(name) / "results.json", results, model=model)
        write_csv(Path(name) / "results.csv", results)
        client.log_artifacts(run, name)
    for name in ("report.html", "predictions.parquet"):
        if out and (out / name).is_file():
            client.log_artifact(run, str(out / name))
    for pictures in ("pictures", "sweeps"):
        if out and (out / pictures).is_dir():
            client.log_artifacts(run, str(out / pictures), pictures)
            for picture in sorted((out / pictures).rglob("*.png")):
                shown = {"image": str(picture.relative_to(out).with_suffix("")), "step": 0, "time_ms": now}
                log_picture(client, run, picture, shown)
    client.set_terminated(run)
    for what, where in where_shown(uri, experiment_id, run).items():
        console.print(f"{what}: {escape(where)}", highlight=False, soft_wrap=True)
    return run


def _note(model: str, results: list[Result]) -> str:
    """What was evaluated and what came of it, as Markdown."""
    lines = [f"`{model}` on {len(results)} benchmarks; `report.html` among the artifacts shows the mistakes.", ""]
    lines += [f"- {result.line()}" for result in results]
    rules = dict.fromkeys(result.rerank_rule for result in results if result.rerank_rule)
    return "\n".join([*lines, *(f"- re-ranked: {rule}" for rule in rules)])[:LONGEST]


def _experiment_of(client: object, run: str) -> str | None:
    """The experiment of a run; None where the store does not have it."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        found = client.get_run(run)  # type: ignore[attr-defined]
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise
    check_active(client, found)
    return str(found.info.experiment_id)
