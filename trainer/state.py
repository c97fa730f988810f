"""What a training changes as it runs and a checkpoint stores: engine, queue, drift probe and progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from configs.image_size import height_width
from configs.schema import Recipe
from data_pipeline.hard_plan import Composed
from memory.drift import DriftProbe
from memory.place_sets import PlaceSets
from memory.queue import MemoryQueue
from memory.set_queues import SetQueues
from model.network import PlaceModel, build_model
from trainer.devices import check_room
from trainer.engine import build_engine, partitioner, whole_numel
from trainer.place_loss import build_queue
from trainer.process_group import Rank


@dataclass
class Progress:
    """Where a training stands; everything here is in `state.json`."""

    step: int = 0  # position in the plan: global steps begun so far, over all epochs
    skipped_steps: int = 0  # of these, steps without an update because loss or gradient was not finite
    bad_images: int = 0
    recalls: dict[str, float] = field(default_factory=dict)  # mean recall at the smallest K of each validation, by step
    training: str | None = None  # the training's own id: its MLflow run carries it as a tag
    mlflow_run_id: str | None = None  # None if the store had not answered yet
    dataset: str = ""  # digest of the shard sets trained on
    before: list[dict[str, Any]] = field(default_factory=list)  # results of the untrained model
    num_threads: int = 0  # of rank 0, in a sum: another number adds in another order, so that last bits differ

    @property
    def optimizer_step(self) -> int:
        """Updates so far. Skipped steps update nothing, so they age nothing in the queue either."""
        return self.step - self.skipped_steps


@dataclass
class TrainingState:
    """The parts of a training that change, the same objects from its start to its end."""

    engine: Any  # deepspeed.DeepSpeedEngine, which ships no types
    queue: MemoryQueue | SetQueues
    drift: DriftProbe | None
    progress: Progress
    composed: Composed | None = None  # hard places: the steps of this epoch that are composed so far

    @property
    def model(self) -> PlaceModel:
        """The network inside the engine."""
        model: PlaceModel = self.engine.module
        return model

    def num_parameters(self) -> tuple[int, int]:
        """Elements of the parameters that are trained, and of all."""
        numel = [(whole_numel(parameter), parameter.requires_grad) for parameter in self.model.parameters()]
        return sum(n for n, trained in numel if trained), sum(n for n, _ in numel)


def build_state(recipe: Recipe, rank: Rank, *, images_per_rank: int, sets: PlaceSets | None = None) -> TrainingState:
    """The state of a training before its first step, on this rank; torch's random state becomes the rank's own.

    `sets` are the data sets that have a loss each. Raises what `build_model` raises, and
    ValueError for a queue or a probe that no rank could hold. Every rank must call this.
    """
    model = build_model(recipe.model, seed=recipe.seed, partition=partitioner(recipe.engine))
    model.activation_checkpointing = recipe.engine.activation_checkpointing
    size = model.descriptor_size
    queue = build_queue(recipe, size, rank.device, sets)
    drift = _drift_probe(recipe, size, rank.device)
    engine = build_engine(model, engine=recipe.engine, optim=recipe.optim, images_per_rank=images_per_rank)
    torch.manual_seed(recipe.seed + rank.rank)
    return TrainingState(engine, queue, drift, Progress())


def _drift_probe(recipe: Recipe, descriptor_size: int, device: torch.device) -> DriftProbe | None:
    memory, data = recipe.memory, recipe.data
    if not (memory.size and memory.drift_every):
        return None
    image_shape = (3, *height_width(data.image_size))
    num_bytes = memory.drift_images * (math.prod(image_shape) + 4 * descriptor_size)
    check_room(f"memory.drift_images {memory.drift_images}", num_bytes, device)
    return DriftProbe(
        every=memory.drift_every,
        num_images=memory.drift_images,
        queue_steps=math.ceil(memory.size / (data.places_per_batch * data.images_per_place)),
        image_shape=image_shape,
        descriptor_size=descriptor_size,
        device=device,
    )
