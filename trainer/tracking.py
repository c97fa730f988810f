"""What a training tells: to `metrics.jsonl` at once, from there to MLflow by a thread that may wait."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from configs.files import write_whole
from configs.load import shareable
from configs.reading import as_utf_8
from configs.schema import Recipe
from configs.secrets import without_secrets
from trainer import metrics_log
from trainer.metrics_log import LogClock, MetricsLog, read_records
from trainer.mlflow_page import WORKFLOW
from trainer.mlflow_sender import Record, Sender, first_line
from trainer.mlflow_store import DeletedError
from trainer.system_metrics import SystemMetrics

SEND_EVERY_S = 5.0
LONGEST_PAUSE_S = 60.0
LONGEST_PARAM = 6000  # characters that MLflow takes
OWN_UI = "http://127.0.0.1:5000"  # where `mlflow ui` answers
RECALLS = ("recall_", "reranked_recall_")
CLOSE_S = {"FINISHED": 120.0, "FAILED": 10.0, "KILLED": 10.0}


class Tracker:
    """One MLflow run for one training; no method waits for MLflow but `close`, and none raises.

    `metrics.jsonl` is the truth: each method appends a line to it (see `trainer.metrics_log` for a full disk) and a
    thread sends the lines, in order, as `trainer.mlflow_sender` says. While MLflow does not answer it tries again with
    growing pauses; what is left at the end is sent by `rerankvpr sync`. Where `active` is false nothing is done.

    `training` and `run_id` are the training's id and its MLflow run, from the checkpoint that it resumes. Without them
    the folder's `metrics.jsonl` names the training, and its run is the one that carries this id as a tag: MLflow may be
    away whenever a checkpoint is written. `facts` (`trainer.provenance`) become tags and `environment.json`;
    `changes` (`old -> new` by key of the recipe) become tags `changed.<key>`, `datasets` the run's inputs (see
    `trainer.mlflow_page`).
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        console: Console,
        *,
        training: str | None,
        run_id: str | None,
        active: bool,
        facts: dict[str, str] | None = None,
        changes: dict[str, str] | None = None,
        datasets: list[dict[str, Any]] | None = None,
    ) -> None:
        self._recipe, self._folder, self._console = recipe, folder, console
        self.training, self._given_run_id, self._active = training, run_id, active
        self._step = 0
        self._sending: _SenderThread | None = None
        self._system: SystemMetrics | None = None
        if not active:
            return
        path, tracking = folder / metrics_log.NAME, recipe.tracking
        self._now_ms: Callable[[], int] = LogClock(path)
        self._log = MetricsLog(path, self._say)
        self.training = training or _training_id(path)
        self._event(
            "start",
            training=self.training,
            run_id=run_id,
            name=recipe.name,
            experiment=tracking.experiment,
            params=_params(recipe),
            facts=facts or {},
            changes=changes or {},
            datasets=datasets or [],
        )
        if facts:
            self._write_environment(facts)
        if tracking.enabled:
            self._sending = _SenderThread(Sender(folder, tracking.uri, self._say), self._say)
            self._sending.start()
            if tracking.system_metrics_every_s:
                every_s = tracking.system_metrics_every_s
                self._system = SystemMetrics(lambda values: self.metrics(values, self._step), every_s, self._say)
                self._system.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, for checkpoints; None until MLflow has answered once."""
        return (self._sending.sender.run_id if self._sending else None) or self._given_run_id

    def where(self) -> dict[str, str]:
        """How a browser shows the run, by what it is called; empty until MLflow has answered."""
        sender = self._sending.sender if self._sending else None
        if sender is None or not (sender.run_id and sender.experiment_id):
            return {}
        return where_shown(self._recipe.tracking.uri, sender.experiment_id, sender.run_id)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Values of one step, as they are named."""
        if self._active:
            self._step = max(step, self._step)
            self._log.append({"step": step, "time_ms": self._now_ms(), **values})

    def evaluation(
        self,
        name: str,
        step: int,
        params: dict[str, Any],
        metrics: dict[str, float],
        *,
        curves: dict[str, float] | None = None,
    ) -> None:
        """The evaluation of one benchmark, as `eval/<name>/<metric>` of a run of its own under the training's.

        `curves` are those of its metrics that the training's run gets too; None: all.
        """
        self.metrics(
            {f"eval/{name}/{key}": value for key, value in (metrics if curves is None else curves).items()}, step
        )
        texts = {key: str(value) for key, value in params.items()}
        own = {f"eval/{name}/{key}": value for key, value in metrics.items()} | means_of([metrics])
        self._event("evaluation", name=name, step=step, params=texts, metrics=own)

    def artifact(
        self,
        path: Path,
        folder: str | None = None,
        *,
        image: str | None = None,
        step: int | None = None,
        evaluation: str | None = None,
    ) -> None:
        """A file, as it will be when it is sent; `folder` is its place among the run's artifacts.

        With `image` and `step` it is also shown among the pictures of a run, under that name: of the last evaluation of
        benchmark `evaluation`, else of the training.
        """
        shown = {"image": image, "step": step, "evaluation": evaluation} if image else {}
        self._event("artifact", path=self._relative(path), folder=folder, **shown)

    def model(self, checkpoint: Path) -> None:
        """The network of a checkpoint as the run's model, registered if the recipe says so."""
        if self._recipe.tracking.log_model:
            register_as = self._recipe.tracking.register_as
            self._event("model", checkpoint=self._relative(checkpoint), register_as=register_as)

    def flush(self) -> None:
        """Returns once all lines are on the disk (and not only in MLflow's queue): call it before a checkpoint."""
        if self._active:
            self._log.flush()

    def close(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED, and waits for MLflow: 10 s, 120 s for FINISHED.

        It waits no longer than for one answer where MLflow fails; what is left is told with the command that sends it.
        Lines that the disk has not taken by then go to MLflow from memory.
        """
        if not self._active:
            return
        if self._system:
            self._system.stop()
        self._event("end", status=status)
        self._log.flush()
        lost, unwritten = self._log.close(), self._log.unwritten()
        sent_all = self._sending is None or self._sending.finish(CLOSE_S[status], unwritten)
        if lost:
            has_them = self._sending is not None and sent_all and lost == len(unwritten)
            where = "MLflow has them" if has_them else "they are lost"
            self._say(f"{self._log.path}: the disk took no more; {lost} lines are not in it, {where}")
        if not sent_all:
            uri = self._recipe.tracking.uri
            store = "" if is_own_store(uri) else f" --uri {without_secrets(uri, is_address=True)}"
            self._say(
                f"MLflow has not got all of this training; to send the rest: rerankvpr sync {self._folder}{store}"
            )
        self._active = False

    def _event(self, kind: str, **content: Any) -> None:
        if self._active:
            self._log.append({"event": kind, "time_ms": self._now_ms(), **content})

    def _relative(self, path: Path) -> str:
        """A path as seen from the output folder, which may move; absolute where it is outside."""
        absolute = path.resolve()
        home = self._folder.resolve()
        return str(absolute.relative_to(home) if absolute.is_relative_to(home) else absolute)

    def _write_environment(self, facts: dict[str, str]) -> None:
        file = self._folder / "environment.json"
        try:
            write_whole(file, json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            self._say(f"{file}: {error.strerror or error}; not written")
        else:
            self.artifact(file)

    def _say(self, text: str) -> None:
        self._console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)


class _SenderThread(threading.Thread):
    """Calls a sender until all is sent and `finish` was called."""

    def __init__(self, sender: Sender, say: Callable[[str], None]) -> None:
        super().__init__(name="MLflow sender", daemon=True)
        self.sender, self._say = sender, say
        self._finish = threading.Event()
        self._unwritten: Sequence[Record] = ()
        self._sent_all = False

    def run(self) -> None:
        """Sends; says once that MLflow fails, and once that it is back."""
        try:
            self._send()
        finally:
            self.sender.close()

    def _send(self) -> None:
        pause = 0.0
        while True:
            finishing = self._finish.is_set()  # asked before the last look at the file
            try:
                sent = self.sender.send()
                if finishing and not sent:
                    self.sender.send_unwritten(self._unwritten)
            except Exception as error:  # noqa: BLE001 - whatever the store raises, a training must not end of it
                if not pause:
                    deleted = isinstance(error, DeletedError)
                    what = str(error) if deleted else f"MLflow does not answer ({first_line(error)})"
                    self._say(f"{what}; metrics are kept in {self.sender.log}")
                pause = min(LONGEST_PAUSE_S, 2 * pause or 1.0)
                if finishing:
                    return
                self._finish.wait(pause)
                continue
            if pause:
                self._say("MLflow answers again")
                pause = 0.0
            if sent:
                continue
            if finishing:
                self._sent_all = not self.sender.left
                return
            self._finish.wait(SEND_EVERY_S)

    def finish(self, limit_s: float, unwritten: Sequence[Record]) -> bool:
        """Whether everything in the file was sent, and then `unwritten`, after at most `limit_s` seconds."""
        self._unwritten = unwritten
        self._finish.set()
        self.join(limit_s)
        return self._sent_all


def _training_id(log: Path) -> str:
    """The name that a log's first start gave to the training; another where there is none."""
    for _, _, record in read_records(log):
        if record and record.get("event") == "start":
            return str(record["training"])
    return uuid.uuid4().hex


def means_of(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """`eval/recall_<k>` and `eval/reranked_recall_<k>`: means over benchmarks of what all of them have."""
    shared = [key for key in results[0] if key.startswith(RECALLS) and all(key in one for one in results)]
    return {f"eval/{key}": sum(one[key] for one in results) / len(results) for key in shared}


def _params(recipe: Recipe) -> dict[str, str]:
    """All keys of a recipe as MLflow takes them: UTF-8, no secrets. `recipe.yaml` has what is longer than it takes."""
    texts = {key: cut(str(shareable(value))) for key, value in recipe.as_flat().items() if key != "tracking.uri"}
    return {key: as_utf_8(text) for key, text in texts.items()}


def cut(text: str) -> str:
    """A parameter's value as MLflow takes it, with a mark if some is left out."""
    return text if len(text) <= LONGEST_PARAM else f"{text[: LONGEST_PARAM - 3]}..."


def is_own_store(uri: str) -> bool:
    """Whether an address is a store of this user's own accord: the one of MLFLOW_TRACKING_URI, or the default one."""
    own = {os.environ.get("MLFLOW_TRACKING_URI", ""), Recipe().tracking.uri} - {""}
    return without_secrets(uri, is_address=True) in {without_secrets(one, is_address=True) for one in own}


def where_shown(uri: str, experiment_id: str, run_id: str = "") -> dict[str, str]:
    """The address of a run's charts, or of an experiment's runs; and the command that serves it if it is no server's.

    MLflow opens an address without its end in the menu of chat applications.
    """
    if uri.startswith("databricks"):
        return {}  # it has pages of its own
    command = open_command(uri)
    is_served = command.startswith(("http://", "https://"))
    page = f"runs/{run_id}/model-metrics" if run_id else "runs"
    home = command.rstrip("/") if is_served else OWN_UI
    where = {"curves in MLflow": f"{home}/#/experiments/{experiment_id}/{page}?{WORKFLOW}"}
    return where if is_served else where | {"which is served by": command}


def open_command(uri: str) -> str:
    """The command, or the address, that shows a store's runs in a browser; without user name or password."""
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    return f"mlflow ui --backend-store-uri {without_secrets(uri, is_address=True)}"
