"""`rerankvpr train` and `python -m trainer`: a recipe and flags in, a training run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, cast

from tyro.constructors import PrimitiveConstructorSpec

from configs.full_disk import LossyStream
from configs.recipe_flags import RecipeCommand, parse_over_recipe
from configs.schema import Recipe
from trainer.errors import TrainingError, leave, one_line_errors

AUTO = "auto"


def _resume(words: list[str]) -> str:
    if len(words) > 1:
        raise ValueError(f"expected at most one folder, got {' '.join(words)}")
    return words[0] if words else AUTO


RESUME: PrimitiveConstructorSpec[str | None] = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[auto|FOLDER]",
    instance_from_str=_resume,
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [] if value is None else [value],
)


@dataclass(frozen=True)
class TrainCommand(RecipeCommand):
    """Trains a recipe, and evaluates it before and after.

    SIGTERM, SIGUSR1 and Ctrl-C save after the running step and end with status 75. `rerankvpr plan RECIPE` shows
    beforehand what a training would take, and refuses what it would refuse.
    """

    resume: Annotated[str | None, RESUME] = None
    """Resumes from the newest valid checkpoint of --output, or starts if it has none; from FOLDER if one is given."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from, if one is named."""
        return None if self.resume in (None, AUTO) else Path(str(self.resume))


def parse(argv: Sequence[str]) -> TrainCommand:
    """The training that the arguments mean; what the flags dropped of the recipe is said on stderr by rank 0."""
    command, notes = parse_over_recipe(TrainCommand, argv, verb="train")
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"rerankvpr: {note}", file=sys.stderr, flush=True)
    return command


def _checked(command: TrainCommand) -> Recipe:
    """The recipe for its data. Raises all that is wrong with it at once; a restart was checked when it started."""
    from trainer.first_checks import check_start
    from trainer.fit import fitted

    recipe, notes = fitted(command.recipe)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"rerankvpr: {note}", file=sys.stderr, flush=True)
        if command.resume is None:
            check_start(recipe, int(os.environ.get("WORLD_SIZE", "1")), resume=False)
    return recipe


def warm_up() -> None:
    """Parses a recipe, for a fork server: the parsers keep what they learn of the schema."""
    parse(["demo"])


def main(argv: list[str]) -> int:
    """Runs one rank of a training."""
    with one_line_errors():
        command = parse(argv)
        recipe = _checked(command)
    from rich.console import Console

    from data_pipeline.loader import TooManyBadImagesError
    from trainer import flight_recorder
    from trainer.loop import train
    from trainer.process_group import start_process_group, stop_process_group
    from trainer.resume import Resume
    from trainer.start_time import StartTime
    from trainer.stop_signal import REQUEUE_STATUS, Stopped, StoppedInEvaluation

    log = LossyStream(sys.stdout)  # may be on the disk that the training fills
    console = Console(file=cast("IO[str]", log))
    with one_line_errors(TooManyBadImagesError, TrainingError, folder=recipe.output):
        start_time = StartTime()
        flight_recorder.switch_on(recipe.output)
        rank = start_process_group(recipe.engine.collective_timeout_s, tf32=recipe.engine.tf32)
        start_time.part_done("group")
        try:
            resume = Resume(command.checkpoint) if command.resume else None
            summary = train(recipe, rank, console, resume=resume, start_time=start_time)
        except Stopped as stopped:
            if rank.is_main:
                console.print(str(stopped), soft_wrap=True, highlight=False)
            if isinstance(stopped, StoppedInEvaluation):
                leave(REQUEUE_STATUS)
            stop_process_group()
            log.give_up()
            return REQUEUE_STATUS
        if rank.is_main:
            console.print(f"trained {summary.steps} steps; newest checkpoint {summary.checkpoint}", soft_wrap=True)
        stop_process_group()
        log.give_up()
    return 0
