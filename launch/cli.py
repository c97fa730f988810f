"""`rerankvpr VERB ...`: the verbs and what they call."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from configs.names import nearest
from launch.interrupted import one_line_when_interrupted
from trainer.errors import one_line_errors
from trainer.stop_signal import COMMAND


@dataclass(frozen=True)
class Verb:
    """A line of the help, and what is called: `module:function`, or `main` of launch/VERB_command.py."""

    arguments: str
    text: str
    calls: str = ""


VERBS = {
    "demo": Verb("", "Renders a town, trains on it with two ranks, shows what was learned.", "launch.demo:main"),
    "shard": Verb("KIND SRC OUT", "Writes a data set as tar shards with an index.", "launch.data_commands:shard"),
    "verify": Verb("OUT", "Checks every byte of a shard set against its index.", "launch.data_commands:verify"),
    "inspect": Verb(
        "SHARDS [--out DIR] [--plan FILE]",
        "Shows a shard set: counts, a contact sheet, a map, the plan of an epoch.",
    ),
    "train": Verb(
        "RECIPE [--section.key value] [--resume]",
        "Trains a recipe; one process is a group of one.",
        "trainer.command:main",
    ),
    "plan": Verb(
        "RECIPE [--section.key value] [--ranks N --device-gb X]",
        "Prints a training's memory, steps, bytes and time; refuses what it would.",
    ),
    "launch": Verb(
        "[--nnodes N --rdzv HOST --nproc-per-node N] -- VERB ...",
        "Runs a verb on many processes by torchrun.",
        "launch.torchrun:main",
    ),
    "submit": Verb(
        "[--nodes N --gpus-per-node N] -- VERB ... [--then VERB ...]",
        "Submits stages of work to SLURM, each after the one before it.",
        "launch.submit:main",
    ),
    "doctor": Verb(
        "[--shared DIR...]", "Checks the nodes of a group: versions, folders, network, GPUs.", "launch.doctor:main"
    ),
    "rank": Verb("[--fit] -- VERB ...", "One process of a launch on several nodes.", "launch.rank:main"),
    "eval": Verb(
        "--checkpoint DIR|--weights FILE --benchmarks NAME...", "Measures recall before and after re-ranking."
    ),
    "index": Verb(
        "build DB --checkpoint C --out IDX | add IDX DB | info | verify",
        "Encodes a database of photographs once, for `locate`.",
    ),
    "locate": Verb(
        "PHOTO... --index IDX", "Says where photographs were taken: candidates, position, whether to believe it."
    ),
    "show": Verb(
        "attention|pca|matches|similarity|negatives|drift|sweep WHAT...",
        "Draws what a network sees of photographs, and what a training or a sweep found.",
    ),
    "report": Verb("FOLDER... [--out PAGE.html]", "Makes one page of evaluations, several compared with each other."),
    "serve": Verb("--index IDX", "Serves a web page of an index, on this machine only."),
    "sync": Verb("OUTPUT...", "Sends MLflow what it has not received of trainings."),
    "export": Verb("CHECKPOINT OUT.safetensors|.onnx|.pt2|FOLDER", "Writes the trained network for other programs."),
}


def function_of(verb: str) -> Callable[[list[str]], int]:
    """What a verb calls, imported when it is asked for: help should not wait for torch."""
    module, _, name = (VERBS[verb].calls or f"launch.{verb}_command:main").partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return function


def _help() -> None:
    lines = ["rerankvpr: distributed training of visual place recognition, with re-ranking", ""]
    for name, verb in VERBS.items():
        lines += [*_wrapped(f"rerankvpr {name} {verb.arguments}".rstrip(), "  "), *_wrapped(verb.text, "      ")]
    lines += [
        "",
        "`rerankvpr VERB --help` shows a verb's flags; `rerankvpr --version` what is",
        "installed; `rerankvpr --completion bash|zsh|fish` prints a script that completes",
        "verbs and flags in a shell.",
        "RERANKVPR_TRACEBACK=1 shows where an error was raised.",
    ]
    print("\n".join(lines))


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def main(argv: list[str], *, ends: bool = False) -> int:
    """Runs a verb and returns the exit status; whether the process `ends` then, see `one_line_when_interrupted`."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        _help()
        return 0
    verb, rest = argv[0], argv[1:]
    if verb == "--version":
        from launch.versions import version_lines

        print("\n".join(version_lines()))
        return 0
    if verb == "--completion":
        from launch.completion import completion_script

        with one_line_errors():
            print(completion_script(rest[0] if rest else ""))
        return 0
    if verb not in VERBS:
        print(f"rerankvpr: unknown verb {verb!r}; {nearest(verb, VERBS)}", file=sys.stderr)
        return 2
    os.environ.setdefault(COMMAND, shlex.join(["rerankvpr", *argv]))
    with one_line_when_interrupted(verb, ends=ends):
        with one_line_errors():
            status = function_of(verb)(rest)
        sys.stdout.flush()  # a slow reader of it may be what the signal is for
    return status
