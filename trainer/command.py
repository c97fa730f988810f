"""`rerankvpr train` and `python -m trainer`: a recipe and flags in, a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from configs.load import RECIPES, load_recipe
from configs.schema import Recipe
from trainer.errors import TrainingError, leave, one_line_errors

USAGE = "rerankvpr train RECIPE"


@dataclass(frozen=True)
class DryRunFlags:
    """What `--dry-run` is told beside the recipe; what is None is found out on this machine."""

    ranks: int | None = None  # WORLD_SIZE, else 1
    device_gb: float | None = None  # memory of a rank's GPU
    tflops: float | None = None  # sustained by a rank
    json: Path | None = None


def take_dry_run(argv: list[str]) -> tuple[DryRunFlags | None, list[str]]:
    """The flags of a dry run, None where it is not asked for, and the other arguments.

    Raises ValueError for a flag without its number, or without --dry-run.
    """
    rest, taken = [argument for argument in argv if argument != "--dry-run"], {}
    asked = len(rest) < len(argv)
    kinds: dict[str, Callable[[str], Any]] = {"ranks": int, "device-gb": float, "tflops": float, "json": Path}
    for name, kind in kinds.items():
        flag = f"--{name}"
        if flag not in rest:
            continue
        if not asked:
            raise ValueError(f"{flag} is for --dry-run")
        at = rest.index(flag)
        what = {"ranks": "a whole number above 0", "json": "a file"}.get(name, "a number above 0")
        try:
            value = kind(rest[at + 1])
        except (IndexError, ValueError):
            raise ValueError(f"{flag} takes {what}") from None
        if name != "json" and not 0 < value < math.inf:
            raise ValueError(f"{flag} takes {what}, got {rest[at + 1]}")
        taken[name.replace("-", "_")] = value
        del rest[at : at + 2]
    return (DryRunFlags(**taken) if asked else None), rest


def parse(argv: list[str]) -> tuple[Recipe, Path | None, bool]:
    """The recipe that the arguments mean, flags applied over its file; the checkpoint to resume; whether to resume."""
    resume, given, rest = "--resume" in argv, None, list(argv)
    if resume:
        at = rest.index("--resume")
        taken = rest[at + 1 : at + 2]
        has_value = at > 0 and bool(taken) and not taken[0].startswith("-")
        given = Path(taken[0]) if has_value and taken[0] != "auto" else None
        del rest[at : at + 1 + has_value]
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    description = (
        f"Trains RECIPE, a YAML file or one of the shipped recipes ({shipped}), and evaluates it before and after. "
        "Every key of a recipe is a flag; defaults below are the recipe's. --resume (or --resume auto) goes on from "
        "the newest valid checkpoint of --output, or starts where it has none; --resume FOLDER from that one. SIGTERM, "
        "SIGUSR1 and Ctrl-C save after the running step and end with status 75. --dry-run prints memory, steps and "
        "time instead, and refuses what cannot fit; with --ranks N, --device-gb X (of a GPU), --tflops T (sustained "
        "by a rank), --json FILE."
    )
    flags = partial(tyro.cli, Recipe, prog=USAGE, description=description, config=(tyro.conf.FlagConversionOff,))
    if not rest or rest[0].startswith("-"):
        if {"-h", "--help"} & set(rest):
            flags(args=["--help"])
        raise ValueError(f"train needs a recipe first: {USAGE} [--section.key value]; shipped: {shipped}")
    return flags(args=rest[1:], default=load_recipe(Path(rest[0]))), given, resume


def main(argv: list[str]) -> int:
    """Runs one rank of a training."""
    with one_line_errors():
        dry_run_flags, argv = take_dry_run(argv)
        recipe, given, resume = parse(argv)
        if dry_run_flags:
            from trainer.dry_run import dry_run

            return dry_run(recipe, dry_run_flags)
    from rich.console import Console

    from data_pipeline.loader import TooManyBadImagesError
    from trainer.loop import train
    from trainer.process_group import start_process_group, stop_process_group
    from trainer.resume import Resume
    from trainer.stop_signal import REQUEUE_STATUS, Stopped, StoppedInEvaluation

    console = Console()
    with one_line_errors(TooManyBadImagesError, TrainingError, folder=recipe.output):
        rank = start_process_group(recipe.engine.collective_timeout_s, tf32=recipe.engine.tf32)
        try:
            summary = train(recipe, rank, console, resume=Resume(given) if resume else None)
        except Stopped as stopped:
            if rank.is_main:
                console.print(str(stopped), soft_wrap=True, highlight=False)
            if isinstance(stopped, StoppedInEvaluation):
                leave(REQUEUE_STATUS)
            stop_process_group()
            return REQUEUE_STATUS
        if rank.is_main:
            console.print(f"trained {summary.steps} steps; newest checkpoint {summary.checkpoint}", soft_wrap=True)
        stop_process_group()
    return 0
