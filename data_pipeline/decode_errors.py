"""Why a photograph was not decoded: it is damaged, or this machine had no memory for it."""

from __future__ import annotations

import io
import warnings

from configs.reading import is_out_of_memory, reason

MOST_PIXELS = 1 << 28  # 805 MB as RGB; a header that claims more is damaged, or made to take memory


def damage(error: BaseException, data: bytes) -> str:
    """What is wrong with an image file's bytes, from what its decoder raised, in a line.

    Raises MemoryError if nothing is: the machine had no memory for it. A photograph must not count as damaged then.
    """
    if is_out_of_memory(error):
        width, height = _claimed_size(data)
        if width * height <= MOST_PIXELS:
            raise MemoryError(f"out of memory while a photograph of {width} x {height} pixels was decoded") from error
        return f"its header claims more than {MOST_PIXELS >> 20} x 2^20 pixels"
    return reason(error)


def _claimed_size(data: bytes) -> tuple[int, int]:
    """Width and height by the file's header; 0 where it has none that can be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data)).size
    except Image.DecompressionBombError:
        return 1 << 16, 1 << 16
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever the header is, the decoder has failed already
        return 0, 0
