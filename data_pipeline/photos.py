"""Source photographs, read as they are and decoded once to see that they are whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2.functional import resize

from configs.reading import is_out_of_memory, read_regular, reason
from data_pipeline.decode_errors import damage
from data_pipeline.images import check_pixels

_READ_AHEAD = 64


@dataclass(frozen=True)
class Photo:
    """A JPEG file's bytes, and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


def read_photos(
    paths: Iterable[Path], pool: ThreadPoolExecutor, *, max_side: int | None = None, quality: int = 95
) -> Iterator[Photo | str]:
    """Each file's photograph, or why it has none, in order and read a little ahead; see `read_photo`."""
    waiting: deque[Future[Photo | str]] = deque()
    for path in paths:
        waiting.append(pool.submit(read_photo, path, max_side, quality))
        if len(waiting) > _READ_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_photo(path: Path, max_side: int | None = None, quality: int = 95) -> Photo | str:
    """The photograph in a file, or why it has none: missing, unreadable, empty, no JPEG, or cut off.

    torchvision's decoder, which training uses too, refuses a JPEG that ends early, be it by its last byte. A photograph
    whose longer side exceeds `max_side` is scaled to it (antialiased bilinear) and written again with `quality`, 1 to
    100; others keep their bytes. Raises MemoryError if the machine has no memory for it.
    """
    try:
        jpeg = read_regular(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path}: {error.strerror}") from error
        return f"unreadable ({error.strerror})"
    except ValueError as error:  # a name that no file can have
        return f"unreadable ({reason(error)})"
    if not jpeg:
        return "empty"
    if not jpeg.startswith(b"\xff\xd8"):
        return "not a JPEG"
    try:
        check_pixels(jpeg)
    except ValueError as error:
        return str(error)
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, MemoryError) as error:
        why = damage(error, jpeg)
        return f"damaged JPEG ({why})" if why.startswith("its header") else "truncated or damaged JPEG"
    height, width = pixels.shape[1:]
    if max_side is not None and max(height, width) > max_side:
        scale = max_side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = resize(pixels, [height, width], antialias=True)
        jpeg = encode_jpeg(pixels, quality=quality).numpy().tobytes()
    return Photo(jpeg, width=width, height=height)
