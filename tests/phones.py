"""Photographs with the EXIF of a telephone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def photograph(path: Path, gps: dict[int, Any] | None = None, *, shade: int = 0, taken: str = "") -> Path:
    """A grey photograph with these GPS tags."""
    exif = Image.Exif()
    exif[0x0110] = "test phone"  # Pillow writes no EXIF to a PNG that has GPS alone
    if gps is not None:
        exif.get_ifd(0x8825).update(gps)
    if taken:
        exif.get_ifd(0x8769)[0x9003] = taken
    Image.new("RGB", (12, 9), (40 * shade % 256, 9 * shade % 256, 7)).save(path, exif=exif)
    return path


def at(lat: float, lon: float, heading: float | None = None) -> dict[int, Any]:
    """GPS tags of a position, in decimal degrees."""
    tags: dict[int, Any] = {1: "N" if lat >= 0 else "S", 2: (abs(lat), 0.0, 0.0)}
    tags |= {3: "E" if lon >= 0 else "W", 4: (abs(lon), 0.0, 0.0)}
    return tags if heading is None else tags | {17: heading}
