"""What a plug-in's backbone or aggregator gives, held against what it says, before anything is trained."""

from __future__ import annotations

from typing import Any

import torch

from configs.plugins import described
from configs.registry import AGGREGATORS, BACKBONES
from configs.schema import ModelConfig
from model.aggregators.aggregator import Aggregator
from model.backbone import Backbone

IMAGES = 2


@torch.no_grad()
def check_plugged(model: Any, config: ModelConfig) -> None:
    """Raises ValueError for a plug-in whose tokens or descriptors are not as long as its spec or `output_size` says.

    `model` is on the meta device, so this costs no memory; what cannot run there is not checked. Built-ins are not
    checked either: tests do that.
    """
    if not (BACKBONES.origin(config.backbone) or AGGREGATORS.origin(config.aggregator)):
        return
    spec, aggregator = model.spec, model.aggregator
    for what, part, kind in (("aggregator", aggregator, Aggregator), ("backbone", model.backbone, Backbone)):
        if not isinstance(part, kind):
            raise ValueError(
                f"model.{what} {getattr(config, what)}: {type(part).__name__} is no {kind.__module__}.{kind.__name__}"
            )
    names = {"model.aggregator": config.aggregator, "model.backbone": config.backbone}
    if not isinstance(getattr(aggregator, "output_size", None), int):
        raise ValueError(f"model.aggregator {config.aggregator} sets no output_size: the numbers of a descriptor")
    side = spec.patch * max(4, aggregator.least_patches)
    grid = spec.grid(side, side)
    images = torch.empty(IMAGES, 3, side, side, device="meta", dtype=torch.float32)

    def run(key: str, call: Any, expected: tuple[int, ...], words: str) -> Any:
        try:
            found = call()
        except NotImplementedError as error:
            if "meta" in str(error).lower():
                return None  # an operation that needs numbers
            raise ValueError(f"{key} {names[key]}: {described(error)}") from error
        except Exception as error:
            raise ValueError(f"{key} {names[key]}: {described(error)}") from error
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if shape != expected:
            raise ValueError(f"{key} {names[key]}: {words} are {shape}; expected {expected}")
        return found

    added = aggregator.insertion() is not None
    tokens = run(
        "model.backbone",
        lambda: model.backbone(images),
        (IMAGES, spec.num_tokens(side), spec.channels),
        f"tokens of {IMAGES} images of {side} pixels",
    )
    if tokens is not None and added:
        tokens = model.backbone(images, aggregator.insertion(), final_norm=aggregator.final_norm)
    if tokens is not None:
        run(
            "model.aggregator",
            lambda: aggregator(tokens, grid),
            (IMAGES, aggregator.output_size),
            f"descriptors of {IMAGES} images",
        )
