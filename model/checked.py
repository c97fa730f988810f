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


def check_tokens(backbone: Any, tokens_BTC: torch.Tensor, images: int, least: int, channels: int) -> None:
    """Raises ValueError unless there are at least as many tokens of each image, and as long, as the spec says."""
    shape = tuple(tokens_BTC.shape)
    if len(shape) != 3 or shape[0] != images or shape[1] < least or shape[2] != channels:
        raise ValueError(
            f"backbone {type(backbone).__name__}: tokens are {shape}; expected ({images}, {least}, {channels})"
        )


def check_descriptors(aggregator: Any, descriptor_BD: torch.Tensor, images: int, size: int) -> None:
    """Raises ValueError unless there is a descriptor of `output_size` numbers for each image."""
    if tuple(descriptor_BD.shape) != (images, size):
        raise ValueError(
            f"aggregator {type(aggregator).__name__}: descriptors are {tuple(descriptor_BD.shape)}; expected "
            f"({images}, {size}), of which {size} is its output_size"
        )


@torch.no_grad()
def check_plugged(model: Any, config: ModelConfig) -> None:
    """Raises ValueError for a plug-in whose tokens or descriptors are not as long as its spec or `output_size` says.

    `model` is on the meta device, so this costs no memory; what cannot run there, for it needs numbers, is checked at
    each call by `check_tokens` and `check_descriptors`. Built-ins are not run here: tests do that.
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
        except Exception as error:
            if isinstance(error, NotImplementedError | RuntimeError) and "meta" in str(error).lower():
                return None  # an operation that needs numbers
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
