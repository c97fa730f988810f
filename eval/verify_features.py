"""Every byte of stored features against its digests, for `rerankvpr verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.feature_digest import SUMS, image_sums
from eval.features import FeatureError, check_shard, map_shard

SHARDS = "features-*.safetensors"


def holds_features(folder: Path) -> bool:
    """Whether a folder is one of stored features, or holds such folders."""
    return any(folder.glob(SHARDS)) or any(folder.glob(f"*/{SHARDS}"))


def verify_features(folder: Path, *, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
    """What is damaged in a folder of stored features and the folders in it: a line per shard; empty if nothing is."""
    found = []
    shards = sorted([*folder.glob(SHARDS), *folder.glob(f"*/{SHARDS}")])
    for number, path in enumerate(shards, 1):
        try:
            arrays, metadata = map_shard(path)
            check_shard(path, arrays, metadata)
            if "codes" in arrays:
                damaged = np.flatnonzero(image_sums(arrays) != arrays[SUMS])
                if len(damaged):
                    rows = ", ".join(map(str, damaged[:8].tolist())) + (", ..." if len(damaged) > 8 else "")
                    found.append(f"feature shard {path} is damaged (local features of its images {rows}); remove it")
        except FeatureError as error:
            found.append(str(error))
        if on_progress:
            on_progress(number, len(shards))
    return found
