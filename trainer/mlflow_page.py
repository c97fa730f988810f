"""How trainings look in MLflow's pages: their kind, descriptions, columns of the list, data sets, pictures.

A tag that is there already stays: people edit descriptions and kinds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.secrets import NO_SECRET, without_secrets

KIND = "mlflow.experimentKind"
TRAINING = "custom_model_development"  # what MLflow's menu calls "Machine learning": runs and charts come first
NOTE = "mlflow.note.content"
VIEW = "rerankvpr"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = (
    "metrics.`eval/recall_1`",
    "metrics.`eval/reranked_recall_1`",
    "metrics.`train/loss`",
    "params.`model.backbone`",
    "params.`model.aggregator`",
    "params.`memory.size`",
)
# MLflow sorts groups of charts by name, and puts names without a group near the end.
FIRST_CHARTS = {
    "train/loss": "at_a_glance/loss",
    "eval/recall_1": "at_a_glance/recall_1",
    "eval/reranked_recall_1": "at_a_glance/reranked_recall_1",
}
WORKFLOW = NO_SECRET  # of an address: MLflow's menu of training, not that of chat applications
LONGEST = 5000  # characters of a description; MLflow takes 8,000
_REFUSED_IN_KEYS = re.compile(r"[^a-zA-Z0-9_\-./ ]")


def prepare_experiment(client: Any, experiment_id: str) -> None:
    """Gives an experiment its kind, a description, and a saved view with recall and loss in the list of runs."""
    experiment = client.get_experiment(experiment_id)
    view = {"name": "Recall and loss", "createdAt": experiment.creation_time or 0}
    view["state"] = json.dumps({"selectedColumns": COLUMNS})
    link = f"#/experiments/{experiment_id}/runs?{WORKFLOW}&viewStateShareKey={VIEW}"
    note = (
        f"Trainings for place recognition; evaluations are runs under them. [Runs with recall and loss]({link}).\n\n"
        "- `at_a_glance/...`: loss and mean recalls once more, so that they are the first charts\n"
        "- `eval/recall_1`: mean over benchmarks of recall@1 in %, before re-ranking; `eval/reranked_recall_1` after\n"
        "- `eval/<benchmark>/...`: one benchmark; costs are of evaluations as the recipe asks for them\n"
        "- `train/...`: loss, pairs, pace; `memory/...`: the queue; `system/...`: the machine of rank 0\n"
    )
    for key, value in {KIND: TRAINING, NOTE: note, VIEW_TAG: json.dumps(view)}.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment_id, key, value)


def describe_run(client: Any, run: Any, record: dict[str, Any]) -> None:
    """Gives a training's run a description of its start, with links to its report and its results."""
    if NOTE in run.data.tags:
        return
    params, facts = record["params"], record["facts"]
    said = [f"{params.get('model.backbone', 'a backbone')} with {params.get('model.aggregator', '?')}"]
    if "loss.name" in params:
        said.append(f"{params['loss.name']}, a queue of {params.get('memory.size', '?')} descriptors")
    sets = [f"{one['name']} ({one['places']:,} places, {one['images']:,} images)" for one in datasets_of(record)]
    lines = [f"**{record['name']}**: {'; '.join(said)}.", ""]
    if sets:
        lines.append(f"- trained on {', '.join(sets)}")
    if command := facts.get("command"):
        lines.append(f"- command: `{command}`")
    artifacts = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts"
    lines += [
        f"- at the end: [report.html]({artifacts}/report.html?{WORKFLOW}) with curves, mistakes and what re-ranking "
        f"changed, [results.json]({artifacts}/results.json?{WORKFLOW})",
        "- first to look at: `eval/recall_1`, `train/loss`, `memory/negatives_from_memory`",
    ]
    client.set_tag(run.info.run_id, NOTE, "\n".join(lines)[:LONGEST])


def datasets_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets that a start names; those that are damaged are left out."""
    given = record.get("datasets", [])
    kinds = {"name": str, "location": str, "digest": str, "places": int, "images": int}
    return [
        one
        for one in (given if isinstance(given, list) else [])
        if isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in kinds.items())
    ]


def log_datasets(client: Any, run_id: str, record: dict[str, Any]) -> None:
    """The shard sets of a training as inputs of its run; those that the run has already are not doubled."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for one in datasets_of(record):
        location = without_secrets(one["location"], is_address=True)
        kind = urlsplit(location).scheme or "local"
        profile = json.dumps({"places": one["places"], "images": one["images"]})
        source = json.dumps({"uri": location})
        dataset = Dataset(one["name"][:500], one["digest"][:36], kind, source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", "training")]))
    if inputs:
        client.log_inputs(run_id, datasets=inputs)


def run_shown_on(client: Any, run_id: str, record: dict[str, Any]) -> str:
    """The run that shows a line's picture: that of the last evaluation of its benchmark, else the training's.

    MLflow writes all parameters of a run above each of its pictures, and an evaluation has four of them.
    """
    name = record.get("evaluation")
    if not isinstance(name, str):
        return run_id
    experiment = client.get_run(run_id).info.experiment_id
    under = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", order_by=["attributes.start_time DESC"]
    )
    found = (run.info.run_id for run in under if run.data.params.get("benchmark") == name)
    return str(next(found, run_id))


def log_picture(client: Any, run_id: str, path: Path, record: dict[str, Any]) -> None:
    """A picture for the run's image grid, once, if a line names its `image` (a name), `step` and `time_ms`.

    A file that is no picture is passed over.
    """
    from PIL import Image

    name, step, time_ms = (record.get(key) for key in ("image", "step", "time_ms"))
    if not (isinstance(name, str) and isinstance(step, int) and isinstance(time_ms, int)):
        return
    key = _REFUSED_IN_KEYS.sub("_", name)
    stem = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{time_ms}+"
    if any(file.path.startswith(stem) for file in client.list_artifacts(run_id, "images")):
        return
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:  # noqa: BLE001 - damaged bytes make decoders raise anything
        return
    client.log_image(run_id, picture, key=key, step=step, timestamp=time_ms)
