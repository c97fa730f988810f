"""How a shard set is written."""

from __future__ import annotations

import os
from dataclasses import dataclass

SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ShardOptions:
    """About `shard_bytes` of source photographs in a tar; those larger than `max_side` scaled to it.

    Scaled photographs, and with `convert` those that are no JPEGs, are written with JPEG `quality`; others keep their
    bytes. At most the share `max_bad` of all
    images may be unreadable. `workers` processes share `threads` decoding threads (None: as many as cores); neither
    changes a byte. Raises ValueError for what cannot be.
    """

    shard_bytes: int = SHARD_BYTES
    max_bad: float = 0.001
    max_side: int | None = None
    quality: int = 95
    convert: bool = False
    threads: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}; it is a share of all images, 0 to 1")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; use 1 or more (default {SHARD_BYTES})")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side is {self.max_side}; give the longer side in pixels, 1 or more")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it is JPEG's, 1 to 100")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; use 1 or more")

    @property
    def threads_per_worker(self) -> int:
        """Decoding threads of each process, at least 1."""
        return max(1, (self.threads or os.cpu_count() or 1) // self.workers)

    def digest_text(self, format_version: int, min_images_per_place: int) -> str:
        """What of the options decides bytes, for the set's digest."""
        text = f"{format_version} {self.shard_bytes} {min_images_per_place}"
        if self.max_side is not None:
            text += f" {self.max_side} {self.quality}"
        return f"{text} convert {self.quality}" if self.convert else text


DEFAULTS = ShardOptions()
