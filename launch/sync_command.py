"""`rerankvpr sync`: what MLflow has not got of trainings, from their output folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from configs.flags import parse_flags
from configs.load import load_stored_recipe
from configs.plugins import load_plugins
from configs.secrets import without_secrets
from data_pipeline.folder_lock import LockedError, holder
from trainer import metrics_log
from trainer.metrics_log import is_open, read_records
from trainer.progress import progress_bar

if TYPE_CHECKING:
    from trainer.mlflow_sender import Sender


@dataclass(frozen=True)
class SyncCommand:
    """Sends what MLflow has not received of trainings. Sent twice, it changes nothing.

    A training that was killed ends as KILLED, at its last line; one that still runs is left to itself. Files are sent
    from inside the folder alone.
    """

    outputs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT...")]
    """Output folders of trainings (they hold metrics.jsonl)."""
    uri: str = ""
    """MLflow store or server; by default the recipe's, if that is MLFLOW_TRACKING_URI or the default. User and
    password are those of MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: a recipe that is kept holds neither."""
    plugins: tuple[str, ...] = ()
    """Files (my_vpr.py) or modules of the training, which building its network for MLflow may need."""


def main(argv: list[str]) -> int:
    """Sends each folder's lines and says what was sent."""
    command = parse_flags(SyncCommand, argv, prog="rerankvpr sync")
    if not command.outputs:
        raise ValueError("sync needs the output folder of a training: rerankvpr sync runs/demo")
    for folder in command.outputs:
        if not (folder / metrics_log.NAME).is_file():
            raise ValueError(f"{folder} holds no {metrics_log.NAME}; expected the output folder of a training")
    console = Console()
    load_plugins(command.plugins)
    for folder in command.outputs:
        _sync(folder, command.uri, console)
    return 0


def _sync(folder: Path, uri: str, console: Console) -> None:
    from trainer.mlflow_sender import Sender, first_line
    from trainer.mlflow_store import DeletedError
    from trainer.tracking import where_shown

    log = folder / metrics_log.NAME
    if holder(folder) or is_open(log):
        _print(console, f"{folder}: its training runs and sends by itself; left alone")
        return
    uri = uri or _own_store(folder)
    store = without_secrets(uri, is_address=True)
    _print(console, f"{folder}: sending to {store}")
    sender = Sender(folder, uri, lambda text: console.print(f"[yellow]{escape(text)}", soft_wrap=True))
    try:
        with progress_bar(console, f"{folder}, bytes", log.stat().st_size) as update:
            while sender.send():
                update(sender.offset, note=", ".join(f"{n:,} {what}" for what, n in sender.sent.items()))
        status = _status(sender, log)
    except LockedError:
        raise
    except DeletedError as error:
        raise ValueError(f"{folder}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{folder}: MLflow at {store} does not answer ({first_line(error)}); {sender.offset} of "
            f"{log.stat().st_size} bytes are sent, the same command resumes"
        ) from error
    finally:
        sender.close()
    counts = ", ".join(f"{n:,} {what}" for what, n in sorted(sender.sent.items()) if n) or "nothing was left to send"
    where = f"run {sender.run_id} at {store}, {status}" if sender.run_id else "no training was begun"
    _print(console, f"{folder}: {counts}; {where}")
    if sender.run_id and sender.experiment_id:
        for what, shown in where_shown(uri, sender.experiment_id, sender.run_id).items():
            _print(console, f"{what}: {shown}")
    if sender.left:
        raise ValueError(f"{folder}: {len(sender.left)} files could not be sent; the same command tries them again")


def _own_store(folder: Path) -> str:
    """The store that the folder's recipe names, if it is this user's.

    Raises ValueError if it is not: the folder may come from somebody else, who would be sent what it holds.
    """
    from trainer.tracking import is_own_store

    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} holds no recipe.yaml; name the store with --uri")
    uri = load_stored_recipe(folder / "recipe.yaml").tracking.uri
    if not is_own_store(uri):
        raise ValueError(
            f"{folder}: its recipe names the store {uri}, which is neither MLFLOW_TRACKING_URI nor the default; if you "
            f"trust it: rerankvpr sync {folder} --uri {uri}"
        )
    return uri


def _status(sender: Sender, log: Path) -> str:
    """How the training ended; ends its run where the training could not."""
    last_ms, ended = 0, ""
    for _, _, record in read_records(log):
        if record and isinstance(record.get("time_ms"), int):
            last_ms = record["time_ms"]
            if record.get("event") in ("start", "end"):
                ended = record.get("status", "")
    if ended or sender.run_id is None:
        return ended
    sender.end("KILLED", last_ms)
    return "KILLED: no end was written"


def _print(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
