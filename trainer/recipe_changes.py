"""What of a recipe differs from the one that a checkpoint was trained by, and what of it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from configs.load import load_stored_recipe, recipe_text
from configs.schema import ANY_NAME, Recipe
from trainer.manifest import CheckpointError
from trainer.recorded_plugins import plugin_changes

# Keys that decide what the stored state means: weights, moments, queue, place in the plan.
FIXED = (
    "seed",
    "data.places_per_batch",
    "data.images_per_place",
    "data.composition",
    "data.access",
    "data.stream_buffer_places",
    "data.stream_lanes",
    "data.set_places",
    "data.sub_batch",
    "data.repeat",
    "data.hard_share",
    "data.hard_every_steps",
    "data.held_out",
    "data.image_size",
    "model.backbone",
    "model.aggregator",
    "model.finetune",
    "model.finetune_last_n_blocks",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_targets",
    "memory.size",
    "memory.queue_over",
    "engine.precision",
    "optim.name",
)
# Where things lie and what they are called; shards and plug-ins are known by their digests.
OF_NO_MATTER = ("name", "output", "data.shards", "tracking.", "plugins")
SHOWN = 80


def recipe_changes(recipe: Recipe, checkpoint: Path) -> dict[str, str]:
    """`old -> new` by key, of all that a resumed training does otherwise than the one that wrote the checkpoint.

    Raises CheckpointError for a key whose change would give the stored state another meaning.
    """
    stored = load_stored_recipe(checkpoint / "recipe.yaml").as_flat()
    ours = Recipe.model_validate(yaml.safe_load(recipe_text(recipe)), context=ANY_NAME).as_flat()  # as stored
    differing = [key for key, value in ours.items() if value != stored.get(key) and not key.startswith(OF_NO_MATTER)]
    for key in differing:
        if key in FIXED and not (key.startswith("data.stream_") and recipe.data.access == "ranges"):
            raise CheckpointError(
                f"{checkpoint} was trained with {key} {_shown(stored.get(key))}, this recipe has {_shown(ours[key])}; "
                "they must agree; to train on from its network, export it and name it as model.weights"
            )
    changes = {key: f"{_shown(stored.get(key))} -> {_shown(ours[key])}" for key in differing}
    return changes | plugin_changes(recipe, checkpoint)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
