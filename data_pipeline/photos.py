"""Source photographs, read as they are and decoded once to see that they are whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torchcodec.encoders import JpegEncoder
from torchvision.transforms.v2.functional import resize

from configs.reading import is_out_of_memory, read_regular, reason
from data_pipeline.decoders import JPEG, TooManyPixelsError, decode_rgb, format_of
from data_pipeline.shard_options import DEFAULTS, ShardOptions

_READ_AHEAD = 64


@dataclass(frozen=True)
class Photo:
    """A JPEG file's bytes, and the size in pixels that it is seen at: its EXIF orientation is applied."""

    jpeg: bytes
    width: int
    height: int


def read_photos(
    paths: Iterable[Path], pool: ThreadPoolExecutor, options: ShardOptions = DEFAULTS
) -> Iterator[Photo | str]:
    """Each file's photograph, or why it has none, in order and read a little ahead; see `read_photo`."""
    waiting: deque[Future[Photo | str]] = deque()
    for path in paths:
        waiting.append(pool.submit(read_photo, path, options))
        if len(waiting) > _READ_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_photo(path: Path, options: ShardOptions = DEFAULTS) -> Photo | str:
    """The photograph in a file, or why it has none: missing, unreadable, empty, no JPEG, or cut off.

    It is decoded as training decodes it, which refuses a JPEG that ends early, be it by its last byte. A JPEG keeps its
    bytes, orientation tag and all, unless its longer side exceeds `options.max_side`: then it is scaled (antialiased
    bilinear). What is scaled, and with `options.convert` what is no JPEG, is written upright, without a tag, with
    `options.quality`. Raises MemoryError if the machine has no memory for it.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path}: {error.strerror}") from error
        return f"unreadable ({error.strerror})"
    except ValueError as error:  # a name that no file can have
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
