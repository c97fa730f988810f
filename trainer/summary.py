"""What a training leaves behind: its results as a file, its best network in MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.tables import write_results
from eval.result import Result
from trainer.checkpoint_folder import find_checkpoint
from trainer.context import Context
from trainer.provenance import how_made
from trainer.state import Progress


@dataclass(frozen=True)
class Summary:
    """What a training leaves behind."""

    steps: int
    checkpoint: Path
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def summarise(context: Context, progress: Progress, checkpoints: Path, results: list[Result]) -> Summary:
    """Writes the results of a training that has ended; the best network goes to MLflow.

    A disk that does not take them is reported.
    """
    checkpoint = find_checkpoint(checkpoints / "latest")
    if context.rank.is_main:
        path = context.recipe.output / "results.json"
        made = how_made(world_size=context.rank.world_size, device=context.rank.device)
        before, recalls = progress.before, progress.recalls
        try:
            write_results(path, results, model=str(checkpoint), before=before, validations=recalls, made=made)
            context.tracker.artifact(path)
        except OSError as error:
            context.say(f"[yellow]results could not be written to {path} ({error}); they are printed above")
        context.tracker.model(find_checkpoint(checkpoints))
    return Summary(progress.step, checkpoint, progress.before, [result.as_dict() for result in results])
