"""A recipe's batch, queue and recalls lowered to what a small shard set has."""

from __future__ import annotations

import numpy as np

from configs.schema import Recipe
from data_pipeline.held_out import draw_views
from data_pipeline.mixture import PlaceMixture, read_mixture
from data_pipeline.plan import Int64, held_out_places
from data_pipeline.storage import StorageError

STEPS_PER_EPOCH = 4  # at least, so that what the last batch leaves over is little
_MULTIPLE = 4  # of places, for 2 and 4 ranks


def fitted(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe for its data if it has `data.fit`, and a line on each key that was lowered.

    Reads the index alone. A recipe whose shards are not here, or give too little, comes back as it is: other checks
    name that.
    """
    if not recipe.data.fit:
        return recipe, []
    try:
        return fit_recipe(recipe, read_mixture(recipe.data))
    except (ValueError, FileNotFoundError, StorageError):
        return recipe, []


def fit_recipe(recipe: Recipe, places: PlaceMixture) -> tuple[Recipe, list[str]]:
    """The recipe with P, K, memory.size and eval.recall_at lowered to what `places` has; a pure function.

    K is at most the views of the smallest place. P leaves STEPS_PER_EPOCH steps in an epoch, in multiples of 4 where
    there are as many; the queue holds an epoch at most. Ranks do not enter. What cannot be lowered stays as it is.
    """
    data = recipe.data
    held_out = held_out_places(places.num_places, data.held_out, seed=recipe.seed)
    trained = places.num_places - len(held_out)
    k = max(2, min(data.images_per_place, int(places.num_views.min())))
    p = min(data.places_per_batch, _places_per_batch(trained))
    queue = min(recipe.memory.size, trained // p * p * k)
    recall_at = recipe.eval.recall_at
    if len(held_out):
        most = _database_of(places, held_out, seed=recipe.seed)
        recall_at = [at for at in recall_at if at <= most] or [1]
    changes = {
        "data.places_per_batch": (data.places_per_batch, p),
        "data.images_per_place": (data.images_per_place, k),
        "memory.size": (recipe.memory.size, queue),
        "eval.recall_at": (recipe.eval.recall_at, recall_at),
    }
    notes = [
        f"{key} {before} -> {now}: what {trained} places to train on have"
        for key, (before, now) in changes.items()
        if before != now
    ]
    return recipe.model_copy(
        update={
            "data": data.model_copy(update={"places_per_batch": p, "images_per_place": k}),
            "memory": recipe.memory.model_copy(update={"size": queue}),
            "eval": recipe.eval.model_copy(update={"recall_at": recall_at}),
        }
    ), notes


def _places_per_batch(trained: int) -> int:
    most = trained // STEPS_PER_EPOCH
    if most >= _MULTIPLE:
        return most // _MULTIPLE * _MULTIPLE
    return max(2, min(trained, most))


def _database_of(places: PlaceMixture, held_out: Int64, *, seed: int) -> int:
    """Images of the database of benchmark held_out."""
    _, others, _ = draw_views(places, held_out, seed=seed)
    return int(np.sum(places.num_views[held_out] - 1)) + len(others)
