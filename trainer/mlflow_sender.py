"""Sends what `metrics.jsonl` holds to MLflow, from where it stopped the last time.

`metrics.sent` beside it holds the store, the run and the byte up to which lines were sent; it is replaced by rename
after each call. A line may be sent twice, where a process dies between the two, and changes nothing then: MLflow keeps
one of two equal metrics, and runs and models carry the line that they come from as a tag.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from configs.files import write_whole
from configs.reading import read_regular, reading
from configs.secrets import without_secrets
from data_pipeline.folder_lock import LOCK, FolderLock
from trainer import metrics_log
from trainer.metrics_log import read_records
from trainer.mlflow_page import FIRST_CHARTS, describe_run, log_datasets, log_picture, prepare_experiment, run_shown_on
from trainer.mlflow_store import active_experiment, check_active, metric_name, open_client

STATE = "metrics.sent"
METRICS_A_CALL = 1000
TRAINING_TAG = "rerankvpr.training"
EVENT_TAG = "rerankvpr.event"
STATUS_TAG = "rerankvpr.status_time_ms"
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

Record = dict[str, Any]


# What an event's line must hold for it to be sent: a folder may come from someone else, or from a damaged disk.
EVENTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"training": str, "name": str, "experiment": str, "params": dict, "facts": dict, "time_ms": int},
    "artifact": {"path": str},
    "evaluation": {"name": str, "step": int, "params": dict, "metrics": dict, "time_ms": int},
    "model": {"checkpoint": str, "register_as": str},
    "end": {"status": str, "time_ms": int},
}


class Sender:
    """Brings one output folder's `metrics.jsonl` into one MLflow run.

    `run_id` and `experiment_id` are set once there is a run; `sent` counts metrics, artifacts, evaluations and
    models. `say` gets a line about what a store refused for good, which is passed over; all else the caller retries.
    Files are sent from inside the folder alone: its `metrics.jsonl` may be somebody else's. `left` are the lines (by
    their first byte) whose files could not be sent; each new sender tries them once more. One process sends at a time.
    """

    def __init__(self, folder: Path, uri: str, say: Callable[[str], None]) -> None:
        self.folder, self.uri, self._say = folder, uri, say
        self.log = folder / metrics_log.NAME
        self.sent: Counter[str] = Counter()
        self.run_id: str | None = None
        self.experiment_id, self.offset = "", 0
        self._client: Any = None
        self._refused_said = False
        self._lock = FolderLock(folder, "sending to MLflow", name=f"{LOCK}.sending")
        self.left: list[int] = []
        state = read_state(folder)
        if state.get("uri") == without_secrets(uri, is_address=True):
            self.run_id, self.offset, self.left = state["run_id"], state["offset"], state["left"]

    def send(self) -> bool:
        """Sends the next lines, a thousand metrics or one event, and returns whether there were any.

        Raises whatever MLflow raises where the store does not answer; the next call tries the same lines again.
        """
        try:
            with contextlib.suppress(OSError):  # a full disk, a folder that is only read: alone in all likelihood
                self._lock.acquire()
            if self._client is None:
                self._connect()
                self._send_left()
            return self._send_next()
        except Exception:
            self._client = None  # the next call looks at the store anew, which may have lost the run
            raise

    def close(self) -> None:
        """Lets others send from this folder."""
        self._lock.release()

    def _send_left(self) -> None:
        """Tries again, once, what an earlier sender could not send."""
        tried, self.left = self.left, []
        for offset in tried:
            for _, _, record in read_records(self.log, offset):
                if record and record.get("event") in ("artifact", "model") and self.run_id:
                    self._send_event(record, offset)
                break
        if tried:
            self._keep_state()

    def _connect(self) -> None:
        # It looks for a run before it asks again for one; the client would ask twice and might get two.
        self._client = open_client(self.uri, retries=0)
        if self.offset > (self.log.stat().st_size if self.log.is_file() else 0):
            self.offset = 0  # another file than the one that was sent
        if self.run_id is not None and not self._exists(self.run_id):
            self._say(f"MLflow does not know run {self.run_id}: all of {self.log} is sent to another")
            self.run_id, self.offset = None, 0

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        check_active(self._client, run)
        self.experiment_id = run.info.experiment_id
        return True

    def send_unwritten(self, records: Sequence[Record]) -> None:
        """Sends records that no disk took, once all that is in the file is sent. Raises what `send` raises."""
        done = 0
        while done < len(records):
            # The time, below 0, stands for the line of a record that is in no file.
            rest = ((-one["time_ms"], number, one) for number, one in enumerate(records[done:], done + 1))
            done = self._send_first(rest, done)

    def _send_next(self) -> bool:
        reached = self._send_first(read_records(self.log, self.offset), self.offset)
        moved = reached > self.offset
        if moved:
            self.offset = reached
            self._keep_state()
        return moved

    def _send_first(self, records: Iterable[tuple[int, int, Record | None]], reached: int) -> int:
        """Sends the first of these lines, a thousand metrics or one event; where the next one begins."""
        lines: list[list[Any]] = []
        num_metrics = 0
        for start, end, record in records:
            if record and "event" in record:
                if not lines:
                    self._send_event(record, start)
                    reached = end
                break
            metrics = _metrics(record) if record and self.run_id else []  # before a start: not a run's
            if lines and num_metrics + len(metrics) > METRICS_A_CALL:
                break
            lines.append(metrics)
            num_metrics += len(metrics)
            reached = end
        if lines:
            self._send_metrics(lines)
        return reached

    def _send_metrics(self, lines: list[list[Any]]) -> None:
        """In one call; where the store refuses that, line by line."""
        together = [metric for line in lines for metric in line]
        if not together:
            return
        if not self._accepted(lambda: self._client.log_batch(self.run_id, metrics=together), say=len(lines) == 1):
            if len(lines) > 1:
                for line in lines:
                    self._send_metrics([line])
            return
        self.sent["metrics"] += sum(metric.key not in FIRST_CHARTS.values() for metric in together)

    def _accepted(self, call: Callable[[], object], *, say: bool = True) -> bool:
        """Whether the store took it; False where it said that it never will."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            if say and not self._refused_said:
                self._refused_said = True
                self._say(f"MLflow refuses a line of {self.log}, which is passed over: {first_line(error)}")
            return False
        return True

    def _send_event(self, record: Record, offset: int) -> None:
        kind = record["event"]
        if not is_whole_event(record):
            self._say(f"{self.log}, byte {offset}: damaged, or of another version; passed over")
        elif kind == "start":
            self._start(record)
        elif self.run_id is None:
            return  # before any start: not a run's
        elif kind == "artifact":
            self._send_files(record["path"], offset, lambda path: self._artifact(path, record))
        elif kind == "evaluation":
            if self._accepted(lambda: self._evaluation(record, offset)):
                self.sent["evaluations"] += 1
        elif kind == "model":
            self._send_files(record["checkpoint"], offset, lambda path: self._model(path, record, offset))
        elif kind == "end":
            self.end(record["status"], record["time_ms"])

    def _start(self, record: Record) -> None:
        """Finds the training's run or creates it, and brings its parameters and tags up to date."""
        from mlflow.entities import Param, RunTag

        if self.run_id is None and record.get("run_id") and self._exists(record["run_id"]):
            self.run_id = record["run_id"]
        if self.run_id is None:
            self.run_id = self._training_elsewhere(record["training"])
        if self.run_id is None:
            self.experiment_id = active_experiment(self._client, record["experiment"])
            tags = {"mlflow.source.name": "rerankvpr train"}
            self.run_id = self._run(TRAINING_TAG, record["training"], record["name"], record["time_ms"], tags)
        self._keep_state()
        run = self._client.get_run(self.run_id)
        check_active(self._client, run)
        self.experiment_id = run.info.experiment_id  # a resume may name another
        self._set_status("RUNNING", record["time_ms"])
        had, tags = run.data.params, dict(record["facts"])
        # A parameter cannot change in MLflow; a training that resumes with another value says so in a tag.
        tags |= {f"changed.{key}": value for key, value in record["params"].items() if had.get(key, value) != value}
        tags |= {f"changed.{key}": change for key, change in record.get("changes", {}).items()}
        if "git.commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git.commit"]
        params = [Param(key, value) for key, value in record["params"].items() if key not in had]
        self._client.log_batch(self.run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])
        self._accepted(lambda: prepare_experiment(self._client, self.experiment_id))
        self._accepted(lambda: describe_run(self._client, run, record))
        self._accepted(lambda: log_datasets(self._client, str(self.run_id), record))

    def _run(self, tag: str, value: str, name: str, time_ms: int, tags: dict[str, str]) -> str:
        """The run that carries a tag; created where there is none."""
        found = self._client.search_runs([self.experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = self._client.create_run(self.experiment_id, start_time=time_ms, run_name=name, tags={tag: value, **tags})
        return str(run.info.run_id)

    def _training_elsewhere(self, training: str) -> str | None:
        """The training's run in any experiment: a resume may name another one, or the experiment another name."""
        token: str | None = None
        while True:
            page = self._client.search_experiments(page_token=token)
            ids = [experiment.experiment_id for experiment in page]
            found = self._client.search_runs(ids, f"tags.`{TRAINING_TAG}` = '{training}'", max_results=1) if ids else []
            if found:
                self.experiment_id = found[0].info.experiment_id
                return str(found[0].info.run_id)
            token = page.token
            if not token:
                return None

    def _send_files(self, name: str, offset: int, send: Callable[[Path], None]) -> None:
        """Sends a file or folder that a line names, unless it is outside; what fails alone is left for another time."""
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL
            inside = False
        if not inside:
            self._say(
                f"{name!r:.200} of {self.log} is outside {self.folder}, or a link that leads out: not sent to MLflow"
            )
            return
        try:
            send(path)
        except Exception as error:  # noqa: BLE001 - each kind of artifact store has its own; told, and tried again
            self._client.get_run(self.run_id)  # raises where the whole store does not answer
            if offset >= 0:
                self.left.append(offset)
            self._say(f"{path} could not be sent ({first_line(error)}); the rest is sent")

    def _artifact(self, path: Path, record: Record) -> None:
        """A file and, if the line says so, a picture of the image grid."""
        if not path.is_file():
            self._say(f"artifact {path} is gone: not sent to MLflow")
            return
        log_picture(self._client, run_shown_on(self._client, str(self.run_id), record), path, record)
        if self._accepted(lambda: self._client.log_artifact(self.run_id, str(path), record.get("folder"))):
            self.sent["artifacts"] += 1

    def _evaluation(self, record: Record, offset: int) -> None:
        """A run of its own under the training's."""
        from mlflow.entities import Param

        step, time_ms, weights = record["step"], record["time_ms"], record["params"].get("weights")
        name = f"eval {record['name']}, {f'{weights}, ' if weights else ''}step {step}"
        tags = {"mlflow.parentRunId": str(self.run_id), "mlflow.source.name": "rerankvpr train"}
        run = self._run(EVENT_TAG, f"{self.run_id}:{offset}", name, time_ms, tags)
        metrics = _values(record["metrics"], step, time_ms)
        params = [Param(key, value) for key, value in record["params"].items()]
        self._client.log_batch(run, metrics=metrics, params=params)
        self._client.set_terminated(run, "FINISHED", end_time=time_ms)

    def _model(self, checkpoint: Path, record: Record, offset: int) -> None:
        from trainer.logged_model import log_model

        logged = False

        def log() -> None:
            nonlocal logged
            logged = log_model(
                self._client,
                str(self.run_id),
                checkpoint,
                register_as=record["register_as"],
                tags={EVENT_TAG: f"{self.run_id}:{offset}", "checkpoint": checkpoint.name},
                say=self._say,
            )

        if self._accepted(log) and logged:
            self.sent["models"] += 1

    def end(self, status: str, time_ms: int) -> None:
        """Ends the run as FINISHED, FAILED or KILLED at a time in milliseconds since 1970, unless it went on since."""
        self._set_status(status, time_ms)

    def _set_status(self, status: str, time_ms: int) -> None:
        """Unless a later line did: an older folder of the training may be sent after the one that resumed it."""
        run = self._client.get_run(self.run_id)
        if time_ms < int(run.data.tags.get(STATUS_TAG, 0)):
            return
        self._client.set_tag(self.run_id, STATUS_TAG, str(time_ms))
        if status != "RUNNING":
            self._client.set_terminated(self.run_id, status, end_time=time_ms)
        elif run.info.status != status:
            self._client.update_run(self.run_id, status=status)

    def _keep_state(self) -> None:
        uri = without_secrets(self.uri, is_address=True)
        sent = {"run_id": self.run_id, "experiment_id": self.experiment_id, "offset": self.offset, "left": self.left}
        with contextlib.suppress(OSError):  # a full disk: the lines after the last that was kept are sent twice
            write_whole(self.folder / STATE, json.dumps({"uri": uri, **sent}) + "\n")


def _metrics(record: Record) -> list[Any]:
    """A line's metrics, those of `FIRST_CHARTS` under both names; empty for a line that is none or has no time."""
    step, time_ms = record.get("step"), record.get("time_ms")
    if not _is_number(step, int) or not _is_number(time_ms, int):
        return []
    values = {key: value for key, value in record.items() if key not in ("step", "time_ms")}
    again = {name: values[key] for key, name in FIRST_CHARTS.items() if key in values}
    return _values(values | again, step, time_ms)


def _values(values: dict[str, Any], step: Any, time_ms: Any) -> list[Any]:
    """The numbers among a step's values as MLflow's metrics."""
    from mlflow.entities import Metric

    return [Metric(metric_name(key), float(v), time_ms, step) for key, v in values.items() if _is_number(v)]


def _is_number(value: object, kind: type | UnionType = int | float) -> bool:
    """Whether MLflow can hold a number: its whole ones have 64 bits, Python's and JSON's any."""
    return isinstance(value, kind) and (not isinstance(value, int) or abs(value) < 2**63)


def is_whole_event(record: Record) -> bool:
    """Whether an event's line holds what sending it needs."""
    wanted = EVENTS.get(record["event"]) if isinstance(record["event"], str) else None
    return wanted is not None and all(
        _is_number(record.get(key), int) if kind is int else isinstance(record.get(key), kind)
        for key, kind in wanted.items()
    )


def read_state(folder: Path) -> dict[str, Any]:
    """What `metrics.sent` of an output folder says: uri, run_id, offset, left; empty where it is missing or damaged."""
    try:
        state = json.loads(read_regular(folder / STATE))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds: dict[str, Any] = {"uri": str, "run_id": (str, type(None)), "offset": int}
    whole = isinstance(state, dict) and all(isinstance(state.get(key, kinds), kind) for key, kind in kinds.items())
    left = state.get("left", []) if whole else None
    numbers = [state["offset"], *left] if isinstance(left, list) else [None]
    return state | {"left": left} if all(isinstance(n, int) and n >= 0 for n in numbers) else {}


def run_of(checkpoint: Path) -> str | None:
    """The MLflow run of a checkpoint's training: by the checkpoint, else by its output folder; None if unknown."""
    file = checkpoint / "state.json"
    with reading(file, "the state of a training"):
        run_id = dict(json.loads(file.read_text()).items()).get("mlflow_run_id")
        if not isinstance(run_id, str | None):
            raise ValueError("mlflow_run_id is no text")
    return run_id or read_state(checkpoint.parent.parent).get("run_id")


def first_line(error: BaseException) -> str:
    """The first line of an error, without user names or passwords of the addresses in it."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return without_secrets(re.sub(r"\s+", " ", text))
