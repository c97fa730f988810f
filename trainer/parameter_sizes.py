"""How many numbers a network has, as plans of memory and of bytes sent need them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import Recipe
from model.lora import in_frozen_precision
from model.network import PlaceModel, meta_model
from trainer.engine import parameter_groups

KEPT_WHOLE = 100_000  # elements up to which ZeRO-3 leaves a parameter whole on all ranks (DeepSpeed's default)


@dataclass(frozen=True)
class Sizes:
    """Elements of a network's parameters, as the plan needs them."""

    trained: int
    frozen: int
    kept_whole: int  # in parameters small enough for ZeRO-3 to leave them whole, trained ones
    kept_whole_frozen: int
    largest_group: int  # of the optimizer's parameter groups
    largest: int  # of the trained parameters
    by_parameter: tuple[tuple[int, bool], ...]  # elements and whether trained, in the model's order
    descriptor: int  # numbers of a global descriptor
    frozen_narrow: int  # of the frozen elements, those that model.frozen_precision is for
    blocks_after: tuple[int, ...]  # by_parameter's: blocks that come after the one of a parameter

    @property
    def total(self) -> int:
        """All elements."""
        return self.trained + self.frozen

    def blocks_behind(self, bucket: int) -> int | None:
        """Blocks that backward has left behind when a first bucket of so many elements is full; None if it takes all.

        Gradients come from the last layer to the first; a bucket is sent when the next one does not fit any more.
        """
        filled = 0
        for (numel, trains), blocks in zip(reversed(self.by_parameter), reversed(self.blocks_after), strict=True):
            if trains and filled + numel > bucket:
                return blocks
            filled += numel if trains else 0
        return None


def parameter_sizes(recipe: Recipe, model: PlaceModel | None = None) -> Sizes:
    """Counts the parameters of a recipe's network, built without memory."""
    model = model or meta_model(recipe.model)
    every = tuple((parameter.numel(), parameter.requires_grad) for parameter in model.parameters())
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, recipe.optim)]

    def count(trained: bool, at_most: float = math.inf) -> int:
        return sum(numel for numel, trains in every if trains == trained and numel <= at_most)

    return Sizes(
        trained=count(True),
        frozen=count(False),
        kept_whole=count(True, KEPT_WHOLE),
        kept_whole_frozen=count(False, KEPT_WHOLE),
        largest_group=max(groups),
        largest=max(numel for numel, trains in every if trains),
        by_parameter=every,
        descriptor=model.descriptor_size,
        frozen_narrow=sum(
            parameter.numel()
            for name, parameter in model.backbone.named_parameters()
            if not parameter.requires_grad and in_frozen_precision(model.backbone, name)
        ),
        blocks_after=tuple(max(0, model.num_layers - 2 - model.layer_of(name)) for name, _ in model.named_parameters()),
    )
