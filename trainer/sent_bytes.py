"""Bytes that each rank sends in a step, from the recipe's numbers alone."""

from __future__ import annotations

from configs.schema import Recipe
from trainer.engine import LIVE
from trainer.memory_plan import FP32, element_bytes, frozen_bytes, sends_wide
from trainer.parameter_sizes import Sizes


def bytes_sent(recipe: Recipe, sizes: Sizes, ranks: int) -> dict[str, float]:
    """Bytes that each rank sends in a step, by what for; ring collectives, which send (W - 1) / W of a tensor."""
    each, _ = element_bytes(recipe)
    stage, chunks = recipe.engine.zero_stage, recipe.engine.encode_chunks
    ring = (ranks - 1) / ranks
    weights = sizes.trained * each * ring
    gradients = sizes.trained * (FP32 if sends_wide(recipe) else each) * ring
    batch = recipe.data.places_per_batch * recipe.data.images_per_place
    sent = {
        "gradients, reduced": gradients * (1 if stage == 3 else 2) * (chunks if stage >= 2 else 1),
        "descriptors, gathered": ring * batch * (FP32 * sizes.descriptor + 8),
        "descriptors' gradients, scattered": ring * batch * FP32 * sizes.descriptor,
    }
    if stage in (1, 2):
        sent["weights, after the update"] = weights
    if stage == 3:
        forward = (sizes.trained * each + frozen_bytes(recipe, sizes)) * ring
        passes = 2 * chunks if chunks > 1 else 1
        # Of a network of up to LIVE elements backward finds the weights still there (benchmarks/simulate.py counts it).
        again = 0.0 if chunks == 1 and sizes.total <= LIVE else chunks * weights
        sent["weights, gathered for use"] = passes * forward + again
    if recipe.memory.placement == "sharded" and recipe.memory.size:
        sent["sharded queue, anchors' sums"] = 2 * ring * batch * FP32 * (recipe.data.images_per_place + 6)
    return {name: num_bytes for name, num_bytes in sent.items() if num_bytes}
