"""Stored features of made-up images, and one folder for all ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from eval.features import StoredFeatures, shard_bounds, shard_path, write_shard


def store(
    folder: Path,
    images: Sequence[torch.Tensor],
    *,
    cells: Sequence[torch.Tensor] | None = None,
    descriptors_ID: torch.Tensor | None = None,
    saliency: Sequence[torch.Tensor] | None = None,
    shard: int = 3,
) -> StoredFeatures:
    """Images given by their patches [n, C], in shards of a few, as extraction writes them."""
    channels = images[0].shape[1]
    bounds = shard_bounds(len(images), shard)
    folder.mkdir(parents=True, exist_ok=True)
    if descriptors_ID is None:
        noise = torch.randn(len(images), 8, generator=torch.Generator().manual_seed(len(images)))
        descriptors_ID = F.normalize(noise, dim=1)
    for number, (first, stop) in enumerate(bounds):
        part = images[first:stop]
        codes = torch.cat([image.reshape(-1, channels) for image in part]).half()
        cell = torch.zeros(len(codes), 2, dtype=torch.uint8)
        if cells is not None:
            cell = torch.cat([c.reshape(-1, 2).to(torch.uint8) for c in cells[first:stop]])
        tensors = {
            "descriptors": descriptors_ID[first:stop].float(),
            "count": torch.tensor([len(image) for image in part]),
            "codes": codes,
            "scale": torch.ones(len(codes)),
            "cell": cell,
            "saliency": (torch.cat([*saliency[first:stop]]) if saliency else torch.ones(len(codes))).half(),
        }
        write_shard(shard_path(folder, number), tensors, "test")
    return StoredFeatures(folder, bounds)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that every rank sees, gone when all are done with it."""
    made = tempfile.TemporaryDirectory() if dist.get_rank() == 0 else None
    name = [made.name if made else None]
    dist.broadcast_object_list(name, 0)
    assert name[0] is not None
    try:
        yield Path(name[0])
        dist.barrier()
    finally:
        if made:
            made.cleanup()
