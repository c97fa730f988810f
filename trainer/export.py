"""A checkpoint's network as one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from configs.files import replacing
from configs.load import check_network, load_stored_recipe, recipe_text
from configs.plugins import METADATA
from configs.reading import reading
from configs.schema import Recipe
from configs.tensors import save_tensors
from model.backbone import network_of
from model.licences import licence_metadata
from model.lora import merged_weights
from model.weights import AGGREGATOR, BACKBONE, PROJECTION
from trainer.checkpoint import checkpoint_weights
from trainer.checkpoint_folder import CheckpointError
from trainer.recorded_plugins import plugins_of


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    recipe: Recipe
    numbers: int


def export_network(checkpoint: Path, out: Path) -> Exported:
    """Writes backbone and aggregator of a step folder to a safetensors file, atomically.

    The backbone has the keys that its weights are published with (facebookresearch's), the aggregator keys that begin
    with `aggregator.`; the metadata holds the recipe, the licence of the backbone's weights, and the digests of the
    plug-ins that it was trained with. What LoRA trained is added to the backbone's matrices.
    """
    recipe = load_stored_recipe(checkpoint / "recipe.yaml")
    check_network(recipe, checkpoint / "recipe.yaml")  # who reads the file could not build it either
    with reading(checkpoint, "a checkpoint of a network", CheckpointError):
        weights = merged_weights(checkpoint_weights(checkpoint), recipe.model)
    backbone = {key.removeprefix(BACKBONE): value for key, value in weights.items() if key.startswith(BACKBONE)}
    spec = recipe.model.spec
    published_layout = network_of(spec).published_layout
    with reading(checkpoint, "a checkpoint of a network", CheckpointError):
        layout = published_layout(backbone, spec)
    state = layout | {key: value for key, value in weights.items() if key.startswith((AGGREGATOR, PROJECTION))}
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "recipe": recipe_text(recipe), "checkpoint": checkpoint.name}
    metadata |= licence_metadata(recipe.model.spec)
    if plugins := plugins_of(checkpoint):
        metadata[METADATA] = json.dumps(plugins)
    with replacing(out) as partial:
        save_tensors({key: value.contiguous() for key, value in state.items()}, partial, metadata=metadata)
    return Exported(out, recipe, sum(value.numel() for value in state.values()))
