"""What every part of a training is given: the recipe, this rank, and where to report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console

from configs.files import write_whole
from configs.load import recipe_text, shareable
from configs.reading import as_utf_8
from configs.schema import Recipe
from data_pipeline.mixture import PlaceMixture
from trainer.process_group import Rank
from trainer.provenance import how_made
from trainer.recorded_plugins import keep_plugins
from trainer.state import Progress
from trainer.stop_signal import StopSignal
from trainer.tracking import Tracker
from trainer.watchdog import Watchdog


@dataclass(frozen=True)
class Context:
    """One training on this rank."""

    recipe: Recipe
    rank: Rank
    console: Console
    say: Callable[[str], None]  # prints on rank 0
    tracker: Tracker
    watchdog: Watchdog


def main_rank_says(rank: Rank, console: Console) -> Callable[[str], None]:
    """A function that prints a line on rank 0, and nothing elsewhere."""

    def say(text: str) -> None:
        if rank.is_main:
            console.print(text, highlight=False, soft_wrap=True)

    return say


def open_context(
    recipe: Recipe,
    rank: Rank,
    console: Console,
    progress: Progress,
    stop_signal: StopSignal,
    *,
    changes: dict[str, str],
    places: PlaceMixture,
) -> Context:
    """Opens the training's record, in which a resumed one continues its MLflow run; every rank must call this.

    Writes `recipe.yaml` and the plug-ins to the output folder. `changes` are those of the recipe since the checkpoint,
    `places` what is trained on.
    """
    made = how_made(world_size=rank.world_size, device=rank.device, data_digest=progress.dataset)
    facts = {key: as_utf_8(value) for key, value in made.items()}  # MLflow takes nothing else
    tracker = Tracker(
        recipe,
        recipe.output,
        console,
        training=progress.training,
        run_id=progress.mlflow_run_id,
        active=rank.is_main,
        facts=facts,
        changes=changes,
        datasets=_datasets(recipe, places),
    )
    if rank.is_main:
        write_whole(recipe.output / "recipe.yaml", recipe_text(recipe))
        tracker.artifact(recipe.output / "recipe.yaml")
        for copy in keep_plugins(recipe):
            for file in sorted(copy.rglob("*.py")) if copy.is_dir() else [copy]:
                tracker.artifact(file, str(file.parent.relative_to(recipe.output)))
    engine = recipe.engine
    watchdog = Watchdog(
        limit_s=engine.stall_s,
        first_limit_s=engine.timeout_s,
        folder=recipe.output,
        asked_to_stop=stop_signal.noticed,
    )
    return Context(recipe, rank, console, main_rank_says(rank, console), tracker, watchdog)


def _datasets(recipe: Recipe, places: PlaceMixture) -> list[dict[str, Any]]:
    """What MLflow says of each shard set."""
    return [
        {
            "name": as_utf_8(PurePosixPath(shareable(str(location))).name or str(name)),
            "location": as_utf_8(shareable(str(location))),
            "digest": index.digest,
            "places": index.num_places,
            "images": index.num_images,
        }
        for (name, location), index in zip(recipe.data.locations.items(), places.sets, strict=True)
    ]
