"""Photographs as pixels of a network's size, and the normalisation that every DINOv2 expects."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from configs.host_copies import to_device
from configs.image_size import height_width
from configs.reading import read_regular
from data_pipeline.decoders import decode_rgb

Size = int | tuple[int, int]  # the side of a square, or height and width

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What torchvision's resize of uint8 images runs, here in the form that writes where it is told.
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


class UnreadableImageError(ValueError):
    """An image file that is damaged or of no kind that is read; names the file, `why` does not."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: not a readable image ({why})")
        self.why = why


def empty_batch(num_images: int, size: Size, *, device: str = "cpu", pin_memory: bool = False) -> torch.Tensor:
    """uint8 [num_images, 3, H, W] to be filled, its channels interleaved as decoders write them."""
    shape = (num_images, 3, *height_width(size))
    layout = torch.channels_last
    return torch.empty(shape, dtype=torch.uint8, memory_format=layout, device=device, pin_memory=pin_memory)


def decode(data: bytes, size: Size, interpolation: str = "bilinear") -> torch.Tensor:
    """An image file's bytes as uint8 [3, H, W] of that size; see `decode_into`."""
    out_3HW = empty_batch(1, size)[0]
    decode_into(out_3HW, data, interpolation)
    return out_3HW


def decode_into(out_3HW: torch.Tensor, data: bytes, interpolation: str = "bilinear") -> None:
    """Fills uint8 [3, H, W] with an image file: RGB, resized anisotropically to H x W (antialiased, on uint8).

    `interpolation` is "bilinear" or "bicubic"; the pixels are those of torchvision's `resize`. An image of
    `empty_batch` is filled fastest. Raises ValueError where the bytes are no complete image.
    """
    image = decode_rgb(data)
    if image.shape == out_3HW.shape:
        out_3HW.copy_(image)
    else:
        _RESIZE[interpolation](image[None], list(out_3HW.shape[1:]), False, None, None, out=out_3HW[None])


def read_image(path: Path, size: Size, interpolation: str = "bilinear") -> torch.Tensor:
    """The image file at `path` as uint8 [3, H, W] of that size; see `decode_into`. Errors name the file."""
    try:
        return decode(read_regular(path), size, interpolation)
    except ValueError as error:
        raise UnreadableImageError(path, str(error)) from error


def normalise(images_B3HW: torch.Tensor) -> torch.Tensor:
    """uint8 images of any device as float32 with ImageNet's mean and standard deviation, planes of channels apart."""
    floats_B3HW = images_B3HW.to(torch.float32, memory_format=torch.contiguous_format)
    mean_311, std_311 = _mean_and_std(images_B3HW.device)
    return floats_B3HW.div_(255).sub_(mean_311).div_(std_311)


@functools.lru_cache(maxsize=8)
def _mean_and_std(device: torch.device) -> torch.Tensor:
    """Once for each device: torchvision's `normalize` copies them over in every call, and the host waits."""
    return to_device(torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), device)[:, :, None, None]
