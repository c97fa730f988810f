"""Reading one image, and the normalisation that every DINOv2 expects."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from configs.reading import read_regular
from data_pipeline.decode_errors import damage

JPEG = b"\xff\xd8"
PILLOW_READS = ("PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "PPM")
MAX_PIXELS = 2**28  # 805 MB of RGB

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What torchvision's resize of uint8 images runs, here in the form that writes where it is told.
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def empty_batch(num_images: int, side: int, *, device: str = "cpu", pin_memory: bool = False) -> torch.Tensor:
    """uint8 [num_images, 3, side, side] to be filled, its channels interleaved as decoders write them."""
    shape = (num_images, 3, side, side)
    layout = torch.channels_last
    return torch.empty(shape, dtype=torch.uint8, memory_format=layout, device=device, pin_memory=pin_memory)


def decode(data: bytes, side: int, interpolation: str = "bilinear") -> torch.Tensor:
    """An image file's bytes as uint8 [3, side, side]; see `decode_into`."""
    out_3HW = empty_batch(1, side)[0]
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


def decode_rgb(data: bytes) -> torch.Tensor:
    """An image file's bytes as uint8 [3, H, W] of its own size: JPEG, PNG, WebP, GIF, AVIF, TIFF, BMP or PPM.

    Raises ValueError where they are no complete image, or an animation, MemoryError where this machine has no memory
    for it.
    """
    if not data:
        raise ValueError("empty file")
    if not data.startswith(JPEG):
        return _decode_by_pillow(data)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(damage(error, data)) from error


def _decode_by_pillow(data: bytes) -> torch.Tensor:
    """The pixels that torchvision gives, whose decoder of PNG crashes on damaged files (libpng's jump over C++)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=PILLOW_READS)
            if (pictures := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"an animation of {pictures} pictures, not a photograph")
            image.load()
        except Exception as error:
            raise ValueError(damage(error, data)) from error
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def check_pixels(data: bytes) -> None:
    """Raises ValueError where a JPEG's header announces more than `MAX_PIXELS`, for which its decoder takes memory."""
    try:
        width, height = Image.open(io.BytesIO(data), formats=("JPEG",)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # the decoder says what is wrong
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; a photograph has at most {MAX_PIXELS}")


def read_image(path: Path, side: int, interpolation: str = "bilinear") -> torch.Tensor:
    """The image file at `path` as uint8 [3, side, side]; see `decode_into`. Errors name the file."""
    try:
        data = read_regular(path)
        check_pixels(data)
        return decode(data, side, interpolation)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def normalise(images_B3HW: torch.Tensor) -> torch.Tensor:
    """uint8 images of any device as float32 with ImageNet's mean and standard deviation, planes of channels apart."""
    floats_B3HW = images_B3HW.to(torch.float32, memory_format=torch.contiguous_format)
    return F.normalize(floats_B3HW.div_(255), list(IMAGENET_MEAN), list(IMAGENET_STD))
