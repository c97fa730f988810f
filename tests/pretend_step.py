"""The product's training step on any device, the pretend one too: DeepSpeed's engine, real losses, made-up images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import nn

import trainer.state
from configs.image_size import height_width
from configs.schema import Recipe
from data_pipeline import images, warp
from data_pipeline.loader import PlaceBatch
from memory.global_loss import GlobalLoss
from memory.near_places import NearPlaces
from memory.place_sets import PlaceSets
from model.network import PlaceModel, build_model
from tests.pretend_device import HERE, Device, Watcher, moved, pretend_device
from trainer.batches import draw_augmentation
from trainer.process_group import Rank
from trainer.state import TrainingState, build_state
from trainer.step import StepOutcome, TrainingStep

PLACES, VIEWS, SIDE = 6, 3, 28


class PretendAccelerator(CPU_Accelerator):  # type: ignore[misc, unused-ignore]  # ships no types
    """The accelerator that DeepSpeed finds: the pretend device."""

    def device_name(self, device_index: int | None = None) -> str:
        return HERE.type

    def device(self, device_index: int | None = None) -> torch.device:
        return HERE

    def current_device_name(self) -> str:
        return HERE.type

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == HERE.type


@contextmanager
def pretend_training_device(*, numerics: bool = True, watcher: Watcher | None = None) -> Iterator[Device]:
    """`pretend_device`, for DeepSpeed too."""
    before = get_accelerator()
    set_accelerator(PretendAccelerator())
    try:
        with pretend_device(numerics=numerics, watcher=watcher) as device:
            yield device
    finally:
        set_accelerator(before)
        for once_for_each_device in (images._mean_and_std, warp.grids, warp._blur):
            once_for_each_device.cache_clear()


def recipe_of(**changes: dict[str, Any]) -> Recipe:
    """A recipe that augments hard and uses the queue from the first step."""
    sections: dict[str, dict[str, Any]] = {
        "data": {
            **{"shards": "none", "places_per_batch": PLACES, "images_per_place": VIEWS, "image_size": SIDE},
            **{"augment_ops": 3, "augment_magnitude": 15},
        },
        "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem", "finetune_last_n_blocks": 1},
        "memory": {"size": 40, "start_epoch": 0, "decay_lambda": 0.1},
        "engine": {"zero_stage": 0},
        "tracking": {"enabled": False},
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return Recipe.model_validate({"name": "pretend", "output": Path("unused"), **sections})


def batch_of(recipe: Recipe, number: int, *, rank: int = 0, world_size: int = 1, pin: bool = False) -> PlaceBatch:
    """The batch of a step as the loader hands it over: some places return after three steps."""
    data = recipe.data
    share = data.places_per_batch // world_size
    places = _places_of(recipe, number)
    ids_N = places.repeat_interleave(data.images_per_place)
    own = slice(rank * share * data.images_per_place, (rank + 1) * share * data.images_per_place)
    ids_B, views_B = ids_N[own].clone(), torch.arange(data.images_per_place).repeat(share)
    generator = torch.Generator().manual_seed(number * world_size + rank)
    shape = (len(ids_B), 3, *height_width(data.image_size))
    pixels_B3HW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    drawn = draw_augmentation(data, recipe.seed, 0, ids_B, views_B) if data.augmentation != "none" else None
    return PlaceBatch(pixels_B3HW.pin_memory() if pin else pixels_B3HW, ids_B, views_B, ids_N, drawn)


def _parts(recipe: Recipe) -> list[int]:
    return list(recipe.data.places_of_sets.values()) or [recipe.data.places_per_batch]


def _first_places(recipe: Recipe) -> list[int]:
    """The first place of each set, and the number of all: three steps' worth of each."""
    return np.cumsum([0, *(3 * places for places in _parts(recipe))]).tolist()


def _places_of(recipe: Recipe, number: int) -> torch.Tensor:
    """The places of a step, in the plan's blocks."""
    parts = [
        first + number % 3 * places + torch.arange(places)
        for first, places in zip(_first_places(recipe), _parts(recipe), strict=False)
    ]
    blocks = math.gcd(*_parts(recipe))
    return torch.cat([part.view(blocks, -1) for part in parts], dim=1).flatten()


class Steps:
    """A training's steps without what surrounds them."""

    def __init__(
        self, recipe: Recipe, model: PlaceModel, rank: Rank, enter: Callable[[str, int], None] = lambda *_: None
    ) -> None:
        """`model` is the recipe's, on its device already; `enter` is called at the start of each section of a step."""
        self.recipe, self.rank = recipe, rank
        sets, near = None, None
        if names := list(recipe.data.places_of_sets):
            sets = PlaceSets(names, _first_places(recipe), [1.0] * len(names))
        if metres := recipe.memory.min_negative_m:
            points = torch.rand(_first_places(recipe)[-1], 3, generator=torch.Generator().manual_seed(0))
            near = NearPlaces(1000 * points, metres).to(rank.device)

        def given(*_: Any, partition: Callable[[nn.Module], None] | None = None, **__: Any) -> PlaceModel:
            for part in reversed(list(model.modules())) if partition else ():
                if partition and [*part.parameters(recurse=False)]:
                    partition(part)
            return model

        images = recipe.data.places_per_batch * recipe.data.images_per_place // rank.world_size
        built, trainer.state.build_model = trainer.state.build_model, given
        try:
            self.state: TrainingState = build_state(recipe, rank, images_per_rank=images, sets=sets)
        finally:
            trainer.state.build_model = built
        watchdog = SimpleNamespace(enter=enter)
        context: Any = SimpleNamespace(recipe=recipe, watchdog=watchdog)
        loss = GlobalLoss(recipe.loss, recipe.memory, near=near, sets=sets)
        self.step = TrainingStep(context, loss, self.state, steps_per_epoch=100)

    def next(self) -> StepOutcome:
        """The next step of the training, with three votes."""
        rank, number = self.rank, self.state.progress.step
        pin = rank.device.type != "cpu"
        batch = batch_of(self.recipe, number, rank=rank.rank, world_size=rank.world_size, pin=pin)
        outcome = self.step(batch, 1e-3, lambda: [1.0, 0.0, 2.0])
        self.state.progress.step += 1
        return outcome


def steps_on_cpu(recipe: Recipe) -> Steps:
    """On the CPU as a training has them, in the process group that there is."""
    return Steps(recipe, build_model(recipe.model), _rank(torch.device("cpu")))


def steps_elsewhere(recipe: Recipe, model: PlaceModel, enter: Callable[[str, int], None] = lambda *_: None) -> Steps:
    """Inside `pretend_training_device`; `model` was built outside of it."""
    moved(model)
    return Steps(recipe, model, _rank(HERE), enter)


def _rank(device: torch.device) -> Rank:
    return Rank(dist.get_rank(), dist.get_world_size(), device)
