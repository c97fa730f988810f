"""Where a training starts: at a checkpoint that is found and verified, or at step 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.ranks import from_rank_0
from configs.schema import Recipe
from eval.scratch import remove_leftovers
from trainer.checkpoint import choose_checkpoint, load_checkpoint
from trainer.checkpoint_folder import drop_lost_best, set_aside_newer
from trainer.process_group import Rank
from trainer.recipe_changes import recipe_changes
from trainer.state import TrainingState


@dataclass(frozen=True)
class Resume:
    """Where to resume: from `checkpoint`, or the newest valid one of the output folder, or the start if it has none."""

    checkpoint: Path | None = None


def checkpoint_to_resume(recipe: Recipe, resume: Resume | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to start from, None for step 0; every rank must call this.

    Raises ValueError if the output folder holds a training that is not to be resumed, CheckpointError if the one that
    is named is damaged.
    """
    found, notes = choose_checkpoint(recipe.output / "checkpoints", resume.checkpoint if resume else None)
    if found and not resume:
        raise ValueError(
            f"{recipe.output} already holds a training (up to {found.name}); add --resume or change --output"
        )
    for note in notes:
        say(f"[yellow]left out: {note}")
    if lost := from_rank_0(lambda: drop_lost_best(recipe.output / "checkpoints")):
        say(f"[yellow]{lost}")
    return found


def restore(
    state: TrainingState,
    recipe: Recipe,
    rank: Rank,
    checkpoint: Path | None,
    *,
    dataset: str,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Puts a checkpoint into a new state, if there is one, and sets newer ones of the output folder aside.

    What a killed evaluation left there is removed. Returns what of the recipe has changed since, see `recipe_changes`.
    `dataset` is the digest of the shard sets. Every rank must call this. Raises what `load_checkpoint` and
    `recipe_changes` raise.
    """
    changes: dict[str, str] = {}
    if checkpoint:
        changes = recipe_changes(recipe, checkpoint)
        load_checkpoint(checkpoint, state, recipe, dataset)
        if note := threads_note(state.progress.num_threads, torch.get_num_threads()):
            say(f"[yellow]{checkpoint.name} {note}")
    state.progress.dataset = dataset
    if rank.is_main:
        set_aside_newer(recipe.output / "checkpoints", checkpoint)
        remove_leftovers(recipe.output)
    return changes


def threads_note(stored: int, here: int) -> str:
    """What another number of threads than the checkpoint's means; empty if it is the same, or was not stored (0)."""
    if stored in (0, here):
        return ""
    return (
        f"was computed with {stored} thread(s) per rank, this start has {here}: sums are added in another order and "
        f"the last bits will differ; OMP_NUM_THREADS={stored} keeps them"
    )
