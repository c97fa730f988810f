"""`rerankvpr VERB ...`: the verbs and what they call."""

from __future__ import annotations

import importlib
import os
import shlex
import sys

from configs.names import nearest
from launch.interrupted import one_line_when_interrupted
from trainer.errors import one_line_errors
from trainer.stop_signal import COMMAND

# Each verb's function is imported when it is called: help should not wait for torch.
VERBS = {
    "demo": ("launch.demo:main", "", "Renders a town, trains on it with two ranks, shows what was learned."),
    "shard": ("launch.data_commands:shard", "KIND SRC OUT", "Writes a data set as tar shards with an index."),
    "verify": ("launch.data_commands:verify", "OUT", "Checks every byte of a shard set against its index."),
    "inspect": (
        "launch.inspect_command:main",
        "SHARDS [--out DIR] [--plan FILE]",
        "Shows what a shard set holds: counts, a contact sheet, a map, the plan of an epoch.",
    ),
    "train": (
        "trainer.command:main",
        "RECIPE [--section.key value] [--resume]",
        "Trains a recipe; one process is a group of one.",
    ),
    "plan": (
        "launch.plan_command:main",
        "RECIPE [--section.key value] [--ranks N --device-gb X --tflops T]",
        "What a training would take: memory, steps, bytes sent, time; refuses what it would refuse.",
    ),
    "launch": (
        "launch.torchrun:main",
        "[--nnodes N --rdzv HOST --nproc-per-node N] -- VERB ...",
        "Runs a verb on many processes by torchrun.",
    ),
    "submit": (
        "launch.submit:main",
        "[--nodes N --gpus-per-node N --time T] -- VERB ... [--then VERB ...]",
        "Submits stages of work to SLURM, each after the one before it.",
    ),
    "doctor": (
        "launch.doctor:main",
        "[--shared DIR...]",
        "Checks the nodes of a group: versions, folders, network, GPUs.",
    ),
    "rank": ("launch.rank:main", "[--fit] -- VERB ...", "One process of a launch on several nodes."),
    "eval": (
        "launch.eval_command:main",
        "--checkpoint DIR|--weights FILE --benchmarks NAME...",
        "Recall before and after re-ranking.",
    ),
    "index": (
        "launch.index_command:main",
        "build DB --checkpoint C --out IDX | add IDX DB | info IDX | verify IDX",
        "Encodes a database of photographs once, for `locate`.",
    ),
    "locate": (
        "launch.locate_command:main",
        "PHOTO... --index IDX",
        "Where photographs were taken: candidates, position, whether to believe it.",
    ),
    "show": (
        "launch.show_command:main",
        "attention|pca|matches|similarity IMAGE... --model RUN",
        "Draws what a network sees of photographs.",
    ),
    "report": (
        "launch.report_command:main",
        "FOLDER... [--out PAGE.html]",
        "Evaluations as one page, several against each other.",
    ),
    "serve": ("launch.serve_command:main", "--index IDX", "A web page of an index, on this machine alone."),
    "sync": ("launch.sync_command:main", "OUTPUT...", "Sends MLflow what it has not got of trainings."),
    "export": (
        "launch.export_command:main",
        "CHECKPOINT OUT.safetensors|.onnx|.pt2|FOLDER",
        "The trained network for other programs.",
    ),
}


def _help() -> None:
    lines = ["rerankvpr: distributed training of visual place recognition, with re-ranking", ""]
    for verb, (_, arguments, text) in VERBS.items():
        lines += [f"  rerankvpr {verb} {arguments}".rstrip(), f"      {text}"]
    lines += [
        "",
        "`rerankvpr VERB --help` shows a verb's flags; `rerankvpr --version` what is installed;",
        "`rerankvpr --completion bash|zsh|fish` prints a script that completes verbs and flags in a shell.",
        "RERANKVPR_TRACEBACK=1 shows where an error was raised.",
    ]
    print("\n".join(lines))


def main(argv: list[str]) -> int:
    """Runs a verb and returns the exit status."""
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
    module, _, function = VERBS[verb][0].partition(":")
    os.environ.setdefault(COMMAND, shlex.join(["rerankvpr", *argv]))
    with one_line_when_interrupted(verb), one_line_errors():
        status: int = getattr(importlib.import_module(module), function)(rest)
        return status
