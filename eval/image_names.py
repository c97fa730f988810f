"""Which row of stored features is which image: `images.parquet` beside their shards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.files import replacing
from configs.reading import read_regular, reading
from eval.features import StoredFeatures, shard_path

IMAGES = "images.parquet"


def name_images(features: StoredFeatures, paths: list[Path], role: str) -> None:
    """Writes one row per image: `row` of the features, `image`, `role`, and its `shard` and `shard_row` in that.

    `role` is database or queries; features that have been of both say so. A folder of somebody else's is left as it is.
    Raises ValueError for a damaged table, OSError if there is no room for one.
    """
    file = features.folder / IMAGES
    if file.is_file():
        with reading(file, "a table of images; remove it and it is written again"):
            roles = pq.read_table(pa.BufferReader(read_regular(file)), columns=["role"])["role"]
            known = set(roles[0].as_py().split(", ")) if len(roles) else {role}
        if role in known and len(roles) == len(paths):
            return
        role = ", ".join(sorted({*known, role}))
    counts = [stop - first for first, stop in features.bounds]
    shards = [shard_path(features.folder, number).name for number in range(len(counts))]
    table = pa.table(
        {
            "row": np.arange(len(paths)),
            "image": [str(path).encode("utf-8", "replace").decode() for path in paths],
            "role": [role] * len(paths),
            "shard": np.repeat(shards, counts),
            "shard_row": np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64),
        }
    )
    with contextlib.suppress(PermissionError), replacing(file) as partial:
        pq.write_table(table, partial)
