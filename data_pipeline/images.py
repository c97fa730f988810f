"""Reading one image, and the normalisation that every DINOv2 expects."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def decode(data: bytes, side: int, interpolation: str = "bilinear") -> torch.Tensor:
    """An image file's bytes as uint8 [3, side, side]: RGB, resized anisotropically (antialiased, on uint8).

    `interpolation` is "bilinear" or "bicubic".

    Raises ValueError where the bytes are no complete image.
    """
    if not data:
        raise ValueError("empty file")
    try:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return F.resize(image, [side, side], interpolation=InterpolationMode(interpolation), antialias=True)


def read_image(path: Path, side: int) -> torch.Tensor:
    """The image file at `path` as uint8 [3, side, side]; see `decode`. Errors name the file."""
    try:
        return decode(path.read_bytes(), side)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def normalise(images_B3HW: torch.Tensor) -> torch.Tensor:
    """uint8 images of any device as float32 with ImageNet's mean and standard deviation."""
    return F.normalize(images_B3HW.float().div_(255), list(IMAGENET_MEAN), list(IMAGENET_STD))
