"""`rerankvpr --completion SHELL`: a script that completes verbs and flags, made by tyro from the verbs' own types."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union

import tyro

from configs.flags import REGISTRY
from configs.registry import SOURCES

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str) -> str:
    """The script for a shell. Raises ValueError for one that is not in `SHELLS`."""
    if shell not in SHELLS:
        raise ValueError(
            f"--completion {shell or 'SHELL'}: expected one of {', '.join(SHELLS)}; for example "
            "rerankvpr --completion bash > ~/.local/share/bash-completion/completions/rerankvpr"
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            commands(), prog="rerankvpr", args=["--tyro-print-completion", shell], registry=REGISTRY
        )
    return printed.getvalue()


def commands() -> dict[str, Callable[..., Any]]:
    """What each verb takes, by verb: the type that it parses, or one with the same flags."""
    from launch.data_commands import VerifyCommand, command_of
    from launch.demo import DemoCommand
    from launch.doctor import DoctorCommand
    from launch.eval_command import EvalCommand
    from launch.export_command import ExportCommand
    from launch.index_command import VERBS as INDEX
    from launch.inspect_command import InspectCommand
    from launch.locate_command import LocateCommand
    from launch.plan_command import PlanCommand
    from launch.report_command import ReportCommand
    from launch.serve_command import ServeCommand
    from launch.show_flags import ShowCommand
    from launch.slurm import Resources
    from launch.sync_command import SyncCommand
    from launch.torchrun import LaunchCommand
    from trainer.command import TrainCommand

    shard = _one_of("Shard", {name: command_of(name) for name in SOURCES})
    return {
        "demo": DemoCommand,
        "shard": shard,
        "verify": VerifyCommand,
        "inspect": InspectCommand,
        "train": TrainCommand,
        "plan": PlanCommand,
        "launch": LaunchCommand,
        "submit": Resources,
        "doctor": DoctorCommand,
        "eval": EvalCommand,
        "index": _one_of("Index", {verb: kind for verb, (_, _, kind) in INDEX.items()}),
        "locate": LocateCommand,
        "show": ShowCommand,
        "report": ReportCommand,
        "serve": ServeCommand,
        "sync": SyncCommand,
        "export": ExportCommand,
    }


def _one_of(name: str, kinds: Mapping[str, type]) -> type:
    """A command whose first word is one of `kinds`."""
    named = [Annotated[kind, tyro.conf.subcommand(word, prefix_name=False)] for word, kind in kinds.items()]
    return dataclasses.make_dataclass(name, [("kind", Annotated[Union[tuple(named)], tyro.conf.arg(name="")])])  # noqa: UP007
