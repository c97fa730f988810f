"""Images as a caller has them (paths, bytes, PIL, arrays, tensors), made the pixels that a network takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from configs.reading import read_regular
from configs.schema import EvalConfig
from data_pipeline.decoders import decode_rgb, rgb_of_pillow
from eval.pixels import MOST_CELLS, input_size, interpolation_of

GivenImage = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, Image.Image, NDArray[Any], torch.Tensor]
"""One image: a file's name, a file's bytes, a PIL image, or RGB numbers (see `rgb_of_numbers`)."""
GivenImages = GivenImage | Iterable[GivenImage]
"""One image or several; an array or tensor of four dimensions is several."""


@dataclass(frozen=True)
class Pixels:
    """What the network gets of one image, and the size [height, width] that it had as a person sees it."""

    image_3HW: torch.Tensor  # uint8
    size: tuple[int, int]


def as_list(images: GivenImages) -> list[GivenImage]:
    """The images of an argument that may be one or several. Raises TypeError for what is neither."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return [images] if images.ndim < 4 else list(images)
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return [images]
    if isinstance(images, Iterable) and not isinstance(images, dict | set):
        return list(images)
    raise TypeError(f"images are {type(images).__name__}; expected paths, bytes, PIL images, arrays or a list of these")


def pixels_of(given: GivenImage, config: EvalConfig, patch: int, name: str = "image") -> Pixels:
    """An image by the rule of `config`: the pixels of `eval.pixels.load_image`, for a path and for its bytes.

    Raises ValueError naming the file, or `name` for what has none, and OSError for a file that cannot be opened.
    """
    name = str(given) if isinstance(given, str | os.PathLike) else name
    try:
        image_3HW = _rgb_of(given)
        size = (int(image_3HW.shape[1]), int(image_3HW.shape[2]))
        sides, most = input_size(*size, config, patch), MOST_CELLS * patch
        if max(sides) > most:
            raise ValueError(f"{sides[1]} x {sides[0]} pixels, at most {most} a side; use resize aspect or square")
    except ValueError as error:
        raise ValueError(f"{name}: not a readable image ({error})") from error
    if size != sides:
        mode = InterpolationMode(interpolation_of(config))
        image_3HW = TF.resize(image_3HW, list(sides), interpolation=mode, antialias=True)
    return Pixels(image_3HW, size)


def _rgb_of(given: GivenImage) -> torch.Tensor:
    if isinstance(given, str | os.PathLike):
        given = read_regular(Path(given))
    if isinstance(given, bytes | bytearray | memoryview):
        return decode_rgb(bytes(given))
    if isinstance(given, Image.Image):
        return rgb_of_pillow(given.copy())  # which it turns in place
    if isinstance(given, np.ndarray | torch.Tensor):
        return rgb_of_numbers(given)
    raise ValueError(f"a {type(given).__name__}; expected a path, bytes, a PIL image, an array or a tensor")


def rgb_of_numbers(values: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """RGB numbers as uint8 [3, H, W]: integers from 0 to 255, or floats from 0 to 1, which are rounded.

    [3, H, W], [H, W, 3], or grey [H, W] or one channel; where both ends could be the channels, an array has them last
    and a tensor first. Raises ValueError for other shapes and numbers: an image that is normalised already is refused.
    """
    image = values.detach().cpu() if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    if image.ndim == 2:
        image = image[..., None]
    ends = (0, 2) if isinstance(values, torch.Tensor) and values.ndim == 3 else (2, 0)
    axis = next((end for end in ends if image.ndim == 3 and image.shape[end] in (1, 3)), None)
    if axis is None:
        raise ValueError(f"shape {tuple(image.shape)}; expected [3, H, W], [H, W, 3] or grey [H, W]")
    image_CHW = image.movedim(axis, 0)
    if 0 in image_CHW.shape:
        raise ValueError(f"shape {tuple(image.shape)} has no pixels")
    if image_CHW.dtype != torch.uint8:
        image_CHW = _to_bytes(image_CHW)
    return image_CHW.expand(3, -1, -1)


def _to_bytes(image_CHW: torch.Tensor) -> torch.Tensor:
    if image_CHW.dtype == torch.bool or image_CHW.is_complex():
        raise ValueError(f"numbers of type {image_CHW.dtype}; expected uint8, or floats from 0 to 1")
    most = 1 if image_CHW.is_floating_point() else 255
    low, high = float(image_CHW.min()), float(image_CHW.max())
    if not (low >= 0 and high <= most):
        what = "floats from 0 to 1 (not normalised ones)" if most == 1 else "integers from 0 to 255"
        raise ValueError(f"numbers from {low:g} to {high:g}; expected {what}")
    return (image_CHW.double() * 255).round().byte() if most == 1 else image_CHW.byte()
