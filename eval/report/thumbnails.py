"""Small pictures for a page: each file once, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from configs.reading import read_regular
from data_pipeline.images import decode_rgb

SIDE, QUALITY = 140, 72


def small_jpeg(path: Path, side: int = SIDE) -> bytes:
    """The image of a file as a JPEG of at most `side` pixels. Raises ValueError or OSError naming the file."""
    try:
        image_3HW = decode_rgb(read_regular(path))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    image = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


class Thumbnails:
    """Pictures of a page by number, in base64; a file that cannot be read is counted and has none."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.pictures: list[str] = []
        self.unreadable: dict[Path, str] = {}
        self._number_of: dict[Path, int | None] = {}

    @property
    def is_full(self) -> bool:
        """Whether the budget is used up; pictures that belong together may go a little beyond it."""
        return self.used_bytes >= self.budget_bytes

    def number_of(self, path: Path) -> int | None:
        """The number of a file's picture, which is made the first time; None if it cannot be read."""
        if path not in self._number_of:
            try:
                text = base64.b64encode(small_jpeg(path)).decode()
            except (ValueError, OSError) as error:
                self.unreadable[path] = str(error)
                self._number_of[path] = None
            else:
                self._number_of[path] = len(self.pictures)
                self.pictures.append(text)
                self.used_bytes += len(text)
        return self._number_of[path]
