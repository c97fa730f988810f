"""Source photographs, read as they are and decoded once to see that they are whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_jpeg

_READ_AHEAD = 64


@dataclass(frozen=True)
class Photo:
    """A JPEG file's bytes, and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


def read_photos(paths: Iterable[Path], pool: ThreadPoolExecutor) -> Iterator[Photo | str]:
    """Each file's photograph, or why it has none, in order and read a little ahead."""
    waiting: deque[Future[Photo | str]] = deque()
    for path in paths:
        waiting.append(pool.submit(read_photo, path))
        if len(waiting) > _READ_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_photo(path: Path) -> Photo | str:
    """The photograph in a file, or why it has none: missing, unreadable, empty, no JPEG, or cut off.

    torchvision's decoder, which training uses too, refuses a JPEG that ends early, be it by its last byte.
    """
    try:
        jpeg = path.read_bytes()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if not jpeg:
        return "empty"
    if not jpeg.startswith(b"\xff\xd8"):
        return "not a JPEG"
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return "truncated or damaged JPEG"
    return Photo(jpeg, width=pixels.shape[2], height=pixels.shape[1])
