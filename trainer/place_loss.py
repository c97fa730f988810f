"""What loss and queue need to know of a recipe's places: their data sets, and where they are."""

from __future__ import annotations

import torch
import torch.distributed as dist

from configs.schema import Recipe
from data_pipeline.mixture import PlaceMixture
from data_pipeline.place_positions import points_for
from memory.global_loss import GlobalLoss
from memory.near_places import NearPlaces
from memory.place_sets import PlaceSets
from memory.queue import MemoryQueue
from memory.set_queues import SetQueues
from trainer.devices import check_room

ENTRY_BYTES = 16  # of place and step, on every rank


def place_sets(recipe: Recipe, places: PlaceMixture) -> PlaceSets | None:
    """The data sets that have a loss each, None where one loss is of all."""
    names = recipe.data.places_of_sets
    if not names:
        return None
    weights = [recipe.loss.set_weights.get(name, 1.0) for name in names]
    return PlaceSets(list(names), places.first_place.tolist(), weights)


def build_loss(recipe: Recipe, places: PlaceMixture, sets: PlaceSets | None, device: torch.device) -> GlobalLoss:
    """The recipe's loss over all ranks, on a device. Raises what `GlobalLoss` and `points_for` raise."""
    near = None
    if metres := recipe.memory.min_negative_m:
        points_n3 = points_for(places.sets, "memory.min_negative_m", metres)
        near = NearPlaces(torch.from_numpy(points_n3), metres).to(device)
    return GlobalLoss(recipe.loss, recipe.memory, near=near, sets=sets)


def build_queue(
    recipe: Recipe, descriptor_size: int, device: torch.device, sets: PlaceSets | None
) -> MemoryQueue | SetQueues:
    """The recipe's empty queue; one for each set if they have an own part, in proportion to their places of a batch.

    Raises ValueError if no rank could hold its part.
    """
    memory, data = recipe.memory, recipe.data
    shards = dist.get_world_size() if memory.placement == "sharded" else 1
    num_bytes = memory.size * (4 * descriptor_size // shards + ENTRY_BYTES)
    check_room(f"memory.size {memory.size}", num_bytes, device)

    def queue_of(size: int) -> MemoryQueue:
        return MemoryQueue(size, descriptor_size, device, placement=memory.placement)

    if sets is None or memory.queue_over == "all":
        return queue_of(memory.size)
    sizes = [memory.size * places // data.places_per_batch for places in data.places_of_sets.values()]
    return SetQueues([queue_of(size) for size in sizes], sets)
