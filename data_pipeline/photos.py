"""Source photographs, read as they are and decoded once to see that they are whole."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcodec.encoders import JpegEncoder
from torchvision.transforms.v2.functional import resize

from configs.reading import is_out_of_memory, read_regular, reason
from data_pipeline.decoders import JPEG, TooManyPixelsError, decode_rgb, format_of
from data_pipeline.photo_source import PhotoSource
from data_pipeline.shard_options import DEFAULTS, ShardOptions
from data_pipeline.storage import StorageError

_READ_AHEAD = 64


@dataclass(frozen=True)
class Photo:
    """A JPEG file's bytes, and the size in pixels that it is seen at: its EXIF orientation is applied."""

    jpeg: bytes
    width: int
    height: int


def read_photos(
    source: PhotoSource,
    images: Iterable[Mapping[str, Any]],
    pool: ThreadPoolExecutor,
    options: ShardOptions = DEFAULTS,
) -> Iterator[Photo | str]:
    """Each image's photograph, or why it has none, in order and read a little ahead; see `read_photo`.

    Raises StorageError for a server that stays away: the photographs behind it are not bad.
    """
    fetchers = ThreadPoolExecutor(source.read_threads, "fetch") if source.read_threads else None
    waiting: deque[Future[Photo | str]] = deque()
    try:
        for image in images:
            read = functools.partial(source.read, image)
            if fetchers:
                read = functools.partial(fetchers.submit(read).result)
            waiting.append(pool.submit(_photo, read, source.where(image), options))
            if len(waiting) > max(_READ_AHEAD, 2 * source.read_threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        if fetchers:
            fetchers.shutdown(wait=False, cancel_futures=True)


def fetch_photo(source: PhotoSource, image: Mapping[str, Any], options: ShardOptions = DEFAULTS) -> Photo | str:
    """The photograph of a listing's row, or why it has none; see `read_photo`."""
    return _photo(functools.partial(source.read, image), source.where(image), options)


def read_photo(path: Path, options: ShardOptions = DEFAULTS) -> Photo | str:
    """The photograph in a file, or why it has none: missing, unreadable, empty, no JPEG, or cut off.

    It is decoded as training decodes it, which refuses a JPEG that ends early, be it by its last byte. A JPEG keeps its
    bytes, orientation tag and all, unless its longer side exceeds `options.max_side`: then it is scaled (antialiased
    bilinear). What is scaled, and with `options.convert` what is no JPEG, is written upright, without a tag, with
    `options.quality`. Raises MemoryError if the machine has no memory for it.
    """
    return _photo(lambda: read_regular(path), str(path), options)


def _photo(read: Callable[[], bytes], where: str, options: ShardOptions) -> Photo | str:
    try:
        data = read()
    except FileNotFoundError:
        return "missing"
    except StorageError:
        raise
    except OSError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{where}: {error.strerror}") from error
        return f"unreadable ({error.strerror})"
    except ValueError as error:  # a name that no file can have, or a damaged archive's member
        return f"unreadable ({reason(error)})"
    if not data:
        return "empty"
    is_jpeg = data.startswith(JPEG)
    if not is_jpeg and not options.convert:
        kind = format_of(data)
        return f"not a JPEG but {kind}; --convert writes it as one" if kind else "not a JPEG"
    try:
        pixels_3HW = decode_rgb(data)
    except TooManyPixelsError as error:
        return str(error)
    except ValueError as error:
        return "truncated or damaged JPEG" if is_jpeg else f"not a photograph that can be read ({error})"
    height, width = pixels_3HW.shape[1:]
    scale = min(1.0, (options.max_side or max(height, width)) / max(height, width))
    if scale < 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels_3HW = resize(pixels_3HW, [height, width], antialias=True)
    if scale < 1 or not is_jpeg:
        data = JpegEncoder(pixels_3HW.contiguous()).to_tensor(quality=options.quality).numpy().tobytes()
    return Photo(data, width=width, height=height)
