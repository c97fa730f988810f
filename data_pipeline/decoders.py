"""A photograph's bytes as upright RGB pixels, whatever format they are in.

TorchCodec decodes JPEG, PNG and WebP; Pillow decodes the rest, because TorchCodec decodes every picture of an animation
before one can refuse it, gives other colours than Pillow for AVIF with alpha and GIF with transparency, and reads no
TIFF. Pixels are those of Pillow's `ImageOps.exif_transpose(image).convert("RGB")`: alpha is dropped, not blended.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torchcodec.decoders import decode_jpeg, decode_png, decode_webp

from configs.reading import is_out_of_memory, reason
from data_pipeline.formats import HEIC_EXTRA, reads_heic

JPEG = b"\xff\xd8"
# A header that claims more is damaged, or made to take memory. TorchCodec takes 3 bytes for a pixel, Pillow up to 10.
MAX_PIXELS = 2**28
MAX_PIXELS_OF_PILLOW = 2**27

_BY_TORCHCODEC = {"PNG": decode_png, "WEBP": decode_webp}
_PILLOW_OPENS = (*_BY_TORCHCODEC, "GIF", "TIFF", "BMP", "PPM")

_MARKER = re.compile(rb"\xff([^\x00\xff])")
_WITHOUT_SEGMENT = {0x01, *range(0xD0, 0xD9)}
_ENDS_HEADER = {0xD9, 0xDA}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_APP1, _EXIF = 0xE1, b"Exif\0\0"
_PLACE_IN_SOURCE = re.compile(r"^\w+, \S+:\d+, ")  # of TorchCodec's C++, which its errors begin with


class TooManyPixelsError(ValueError):
    """A header that claims more pixels than are read."""


Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit is below the 200 megapixels of phones


def decode_rgb(data: bytes) -> torch.Tensor:
    """A photograph's bytes as uint8 [3, H, W], RGB of its own size, turned as its EXIF orientation says.

    Reads JPEG, PNG, WebP, GIF, AVIF, TIFF, BMP and PPM, and HEIC with its extra; 16 bits are scaled to 8. Raises
    ValueError if the bytes are none of these, incomplete, an animation, or claim more than `MAX_PIXELS` (or
    `MAX_PIXELS_OF_PILLOW`); MemoryError if this machine has no memory for them. Threads decode beside each other.
    """
    if not data:
        raise ValueError("empty file")
    with _decoding(data):
        if data.startswith(JPEG):
            return cast(torch.Tensor, decode_jpeg(_as_tensor(checked_jpeg(data))))
        image = _open(data)
        decode = _BY_TORCHCODEC.get(image.format or "")
        return decode(_as_tensor(data)) if decode else rgb_of_pillow(image)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height that a photograph's header claims, as stored. Raises what `decode_rgb` raises."""
    with _decoding(data):
        if data.startswith(JPEG):
            frames = [_frame(data, start) for marker, start, _ in _jpeg_segments(data) if marker in _FRAMES]
            return max(frames, key=math.prod)
        return _open(data).size


def format_of(data: bytes) -> str:
    """Pillow's name of the format of a photograph's bytes (`PNG`); empty if they are of none that is read."""
    if data.startswith(JPEG):
        return "JPEG"
    try:
        return _open(data).format or ""
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError("out of memory while a photograph's header was read") from error
        return ""


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Raises ValueError, or MemoryError if there was too little, whatever decoders raise in the block."""
    try:
        yield
    except TooManyPixelsError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(f"out of memory while a photograph of {len(data)} bytes was decoded") from error
        raise ValueError(_PLACE_IN_SOURCE.sub("", reason(error))) from error


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _check_size(width: int, height: int, most: int = MAX_PIXELS) -> None:
    if width * height > most:
        raise TooManyPixelsError(f"its header claims {width} x {height} pixels; {most} at most are read of this format")


def checked_jpeg(data: bytes) -> bytes:
    """A JPEG in which TorchCodec finds the EXIF segment: it looks into the first APP1 alone, which may hold XMP.

    Raises TooManyPixelsError if the header claims more than `MAX_PIXELS`.
    """
    before_exif: list[tuple[int, int]] = []
    has_exif = False
    for marker, start, stop in _jpeg_segments(data):
        if marker in _FRAMES:
            _check_size(*_frame(data, start))
        elif marker == _APP1 and not has_exif:
            has_exif = data.startswith(_EXIF, start + 4)
            if not has_exif:
                before_exif.append((start, stop))
    if has_exif:
        for start, stop in reversed(before_exif):
            data = data[:start] + data[stop:]
    return data


def _frame(data: bytes, start: int) -> tuple[int, int]:
    """Width and height in a frame's segment, which holds its length, bits, height and width."""
    height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 5, start + 7))
    return width, height


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG's header."""
    at = len(JPEG)
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker in _ENDS_HEADER:
            return
        if marker not in _WITHOUT_SEGMENT:
            stop = at + max(2, int.from_bytes(data[at : at + 2], "big"))
            yield marker, found.start(), stop
            at = stop


def _open(data: bytes) -> Image.Image:
    """The image with its header read and checked, its pixels not decoded."""
    formats: tuple[str, ...] = _PILLOW_OPENS
    if data[4:8] == b"ftyp":
        brands = data[8 : int.from_bytes(data[:4], "big")]
        formats = ("AVIF",) if b"avif" in brands or b"avis" in brands else _heic()
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise ValueError("its bytes are of no image format that is read, or cut off in its header") from error
    _check_size(*image.size, MAX_PIXELS if image.format in _BY_TORCHCODEC else MAX_PIXELS_OF_PILLOW)
    if image.format != "HEIF" and (pictures := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"{pictures} pictures in one file (an animation, or pages), not a photograph")
    return image


@functools.cache
def _heic() -> tuple[str, ...]:
    if not reads_heic():
        raise ValueError(f"HEIC, which is read once its extra is installed: {HEIC_EXTRA}")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


def rgb_of_pillow(image: Image.Image) -> torch.Tensor:
    """Pillow's image, which is turned upright, as uint8 [3, H, W]. Raises ValueError for more than 16 bits."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # more than 8 bits a pixel, which Pillow clips
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _to_8_bits(grey_HW: NDArray[Any]) -> NDArray[np.uint8]:
    """16 bits scaled to 8, rounded, as libpng does. Raises ValueError for others, whose white is not known."""
    if not np.issubdtype(grey_HW.dtype, np.integer) or not 0 <= int(grey_HW.min()) <= int(grey_HW.max()) < 2**16:
        raise ValueError(f"pixels of {grey_HW.dtype}; a photograph has 8 or 16 bits a channel")
    return ((grey_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)
