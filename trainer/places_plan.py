"""What `rerankvpr plan` says of a recipe's data sets and of the negatives between their places."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Recipe
from data_pipeline.mixture import EpochPlans
from data_pipeline.place_positions import points_for, share_with_neighbours


def place_lines(recipe: Recipe, plans: EpochPlans | None) -> Iterator[str]:
    """A line for each data set with a loss of its own, and one for memory.min_negative_m; `plans` if shards are here.

    Raises what `points_for` raises.
    """
    data, memory = recipe.data, recipe.memory
    rounds = plans.steps_of_rounds() if plans else {}
    for name, places in data.places_of_sets.items():
        line = f"set {name}: {places} places of a batch, loss x {recipe.loss.set_weights.get(name, 1.0):g}"
        if memory.size:
            own = memory.size * places // data.places_per_batch
            line += f", queue of {own}" if memory.queue_over == "set" else f", queue of all {memory.size}"
        if name in rounds:
            line += f"; all its places seen in {rounds[name]} steps"
        yield line
    if metres := memory.min_negative_m:
        line = f"negatives: no two places nearer than {metres:g} m"
        if plans:
            points_n3 = points_for(plans.places.sets, "memory.min_negative_m", metres)
            near = share_with_neighbours(points_n3, metres)
            line += (
                f"; {near:.1%} of {len(points_n3)} places have another one so near; where they are takes "
                f"{12e-6 * len(points_n3):.1f} MB on each rank"
            )
        yield line
