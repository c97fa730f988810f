"""Which files are photographs, by the ends of their names."""

from __future__ import annotations

import importlib.util

HEIC_EXTRA = "pip install 'rerankvpr[heic]'"


def reads_heic() -> bool:
    """Whether the extra that decodes an iPhone's HEIC is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


JPEG_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif"))
HEIC_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
OTHER_SUFFIXES = frozenset((".png", ".webp", ".gif", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pnm"))
SUFFIXES = JPEG_SUFFIXES | OTHER_SUFFIXES | (HEIC_SUFFIXES if reads_heic() else frozenset())
"""Of what is decoded here, in lower case; a file's suffix may be in any."""
