"""Digests of stored features: of what a search reads, per shard; of what re-ranking reads, per image.

A search reads all descriptors of a shard, so one digest covers them. Local features are a hundred times larger and are
read for a few candidates only, so each image has a checksum of its own, checked when the image is first read.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUMS = "crc32"  # the tensor of the images' checksums, int64 [images]
LOCAL = ("codes", "scale", "cell", "saliency")

Arrays = Mapping[str, NDArray[Any]]


def image_sum(arrays: Arrays, first: int, stop: int) -> int:
    """CRC-32 of the local features of one image, the patches [first, stop) of its shard."""
    value = 0
    for name in LOCAL:
        value = zlib.crc32(np.ascontiguousarray(arrays[name][first:stop]).reshape(-1).view(np.uint8).data, value)
    return value


def image_sums(arrays: Arrays) -> NDArray[np.int64]:
    """`image_sum` of each image of a shard; `count` has their numbers of patches."""
    counts = np.asarray(arrays["count"], dtype=np.int64)
    ends = np.cumsum(counts)
    starts = ends - counts
    return np.array([image_sum(arrays, int(a), int(b)) for a, b in zip(starts, ends, strict=True)], dtype=np.int64)


def shard_digest(arrays: Arrays) -> str:
    """SHA-256 of a shard's descriptors and, if it has local features, of its images' patch counts and checksums."""
    sha = hashlib.sha256()
    for name in ("descriptors", "count", SUMS):
        if name in arrays:
            array = np.ascontiguousarray(arrays[name])
            sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
            sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
