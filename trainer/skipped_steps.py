"""Steps whose loss or gradient was not finite: counted, written down with their places, and limited."""

from __future__ import annotations

import json
import math

from trainer.context import Context
from trainer.errors import TrainingError
from trainer.state import Progress
from trainer.step import StepOutcome


class SkippedSteps:
    """Keeps `skipped_steps.jsonl` in the output folder and `skipped_steps` of a training's progress."""

    def __init__(self, context: Context) -> None:
        self.recipe, self.rank, self.say = context.recipe, context.rank, context.say
        self.record = self.recipe.output / "skipped_steps.jsonl"

    def note(self, outcome: StepOutcome, progress: Progress) -> None:
        """Counts the step that progress stands at. Raises TrainingError above trainer.max_skipped_steps.

        A gradient that is not finite in fp16 is counted alone: the loss scaler looks for its scale in this way.
        """
        progress.skipped_steps += 1
        finite = math.isfinite(outcome.loss)
        if finite and self.recipe.engine.precision == "fp16":
            return
        what = "the gradient is not finite" if finite else f"loss is {outcome.loss}"
        if self.rank.is_main:
            self._write(outcome, progress.step, what)
        self.say(f"[yellow]step {progress.step}: {what}; step skipped, its places are in {self.record}")
        if progress.skipped_steps > self.recipe.trainer.max_skipped_steps:
            raise TrainingError(
                f"step {progress.step}: {progress.skipped_steps} steps had a loss or gradient that is not finite, more "
                f"than trainer.max_skipped_steps; their places are in {self.record}; lower optim.lr or use "
                "engine.precision bf16"
            )

    def _write(self, outcome: StepOutcome, step: int, why: str) -> None:
        places = outcome.place_ids_N.unique().tolist()
        line = {"step": step, "loss": str(outcome.loss), "why": why, "place_ids": places}
        try:
            with self.record.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self.say(f"[yellow]{self.record} cannot be written ({error}): {line}")
