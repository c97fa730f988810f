"""Photographs as pixels for an evaluation: by the training's rule, unless told otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from configs.image_size import height_width, num_pixels, shown_size
from configs.reading import read_regular
from configs.schema import DataConfig, EvalConfig
from data_pipeline.decoders import decode_rgb
from data_pipeline.images import UnreadableImageError, read_image
from eval.local_features import NO_CELL

MOST_CELLS = NO_CELL - 1  # rows and columns of patches are stored in a byte


def as_trained(config: EvalConfig, data: DataConfig) -> EvalConfig:
    """The settings with the training's interpolation, unless they name one."""
    return config if config.interpolation else config.model_copy(update={"interpolation": data.interpolation})


def interpolation_of(config: EvalConfig) -> str:
    """How images are scaled; bilinear where neither the settings nor a training say."""
    return config.interpolation or "bilinear"


def pixel_rule(config: EvalConfig) -> str:
    """How photographs become pixels, for a protocol: `224 px square, bilinear`."""
    size, (height, width) = shown_size(config.image_size), height_width(config.image_size)
    square, squared = (" square", " squared") if height == width else ("", "")
    scaled = {"square": f"{size} px{square}", "aspect": f"area of {size} px{squared}"}
    return f"{scaled.get(config.resize, 'native size')}, {interpolation_of(config)}"


def pixel_differences(config: EvalConfig, data: DataConfig) -> str:
    """In one line, where the pixels of an evaluation are not those of the training; empty if they are the same."""
    trained = {"image_size": shown_size(data.image_size), "resize": "square", "interpolation": data.interpolation}
    ours = {
        "image_size": shown_size(config.image_size),
        "resize": config.resize,
        "interpolation": interpolation_of(config),
    }
    told = [f"eval.{key} is {ours[key]}, trained with {value}" for key, value in trained.items() if ours[key] != value]
    return "; ".join(told)


def input_size(height: int, width: int, config: EvalConfig, patch: int) -> tuple[int, int]:
    """Height and width that an image is resized to, multiples of `patch`, the side of the network's."""
    if config.resize == "square":
        return height_width(config.image_size)
    sides: tuple[float, float] = (height, width)
    if config.resize == "aspect":
        ratio, side = (height / width) ** 0.5, num_pixels(config.image_size) ** 0.5
        sides = (side * ratio, side / ratio)
    tall, wide = (max(patch, round(side / patch) * patch) for side in sides)
    return tall, wide


def load_image(path: Path, config: EvalConfig, patch: int) -> torch.Tensor:
    """An image file as uint8 [3, H, W] of `input_size`. Errors name the file."""
    if config.resize == "square":
        return read_image(path, config.image_size, interpolation_of(config))
    try:
        image = decode_rgb(read_regular(path))
    except ValueError as error:
        raise UnreadableImageError(path, str(error)) from error
    sides, most = input_size(image.shape[1], image.shape[2], config, patch), MOST_CELLS * patch
    if max(sides) > most:
        raise ValueError(f"{path}: {sides[1]} x {sides[0]} pixels, at most {most} a side; use eval.resize aspect")
    return TF.resize(image, list(sides), interpolation=InterpolationMode(interpolation_of(config)), antialias=True)
