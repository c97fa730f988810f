"""Descriptors and local features of images, from one forward pass each, into shards that all ranks write and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configs.progress import OnProgress, PartOf, untold
from configs.ranks import on_all_ranks
from configs.reading import is_out_of_memory, reason
from configs.schema import EvalConfig
from data_pipeline.folder_lock import FolderLock
from data_pipeline.images import UnreadableImageError, normalise
from data_pipeline.index import BadImage
from data_pipeline.tar_writer import BadImages
from eval.encode import Batches, OnUnreadable, encode, image_batches, shard_of
from eval.features import INDEX, StoredFeatures, open_folder, shard_bounds, shard_is_whole, shard_path, write_shard
from eval.local_features import pca_basis, random_basis, read_local
from eval.pixels import load_image
from eval.scratch import hosts_that_miss
from model.network import PlaceModel

FIT_IMAGES = 64
FIT_PATCHES_PER_IMAGE = 256


@torch.inference_mode()
def extract(
    model: PlaceModel,
    paths: list[Path],
    config: EvalConfig,
    folder: Path,
    *,
    key: str,
    projection_CK: torch.Tensor | None = None,
    allowed: BadImages | None = None,
    on_progress: OnProgress = untold,
) -> StoredFeatures:
    """Features of `paths` in `folder`: rank r of W makes shards r, r + W, ... that are not there yet.

    Every rank returns all of them. `on_progress` gets the number of this rank's images that are done. What stops one
    rank, such as a file that cannot be read (or more of them than are `allowed`), ends it on all ranks, once each has
    finished the shard it is at, with the rank's number (see `on_all_ranks`).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = shard_bounds(len(paths), config.batch_size)
    done = 0
    bad: list[BadImage] = []
    lock = FolderLock(folder, "writing features")
    try:
        with on_all_ranks():
            if rank == 0:
                if not all(shard_path(folder, number).is_file() for number in range(len(bounds))):
                    lock.acquire()  # what is complete may be read by any number, in a folder of somebody else's
                open_folder(folder, {"key": key, "images": len(paths)})
        if missing := hosts_that_miss(folder / INDEX):
            raise ValueError(
                f"{missing[0]} does not see rank 0's {folder}; --features is a folder that all nodes mount"
            )
        for turn in range(0, len(bounds), world):
            with on_all_ranks():
                if turn + rank < len(bounds):
                    first, stop = bounds[turn + rank]
                    path, told = shard_path(folder, turn + rank), PartOf(on_progress, len(paths), before=done)
                    if not shard_is_whole(path, key, stop - first):
                        unreadable = _Unreadable(paths[first:stop], allowed, bad)
                        shard = _extract_shard(model, paths[first:stop], config, projection_CK, unreadable, told)
                        write_shard(path, shard, key, unreadable.why)
                    done += stop - first
            on_progress(done, len(paths))
        with on_all_ranks():
            return StoredFeatures(folder, bounds)
    finally:
        lock.release()


class _Unreadable:
    """Images of a shard that cannot be read; raises ValueError if this rank has met more than are allowed."""

    def __init__(self, paths: list[Path], allowed: BadImages | None, bad: list[BadImage]) -> None:
        self.paths, self.allowed, self.bad = paths, allowed, bad
        self.why: dict[int, str] = {}

    def note(self, number: int, error: UnreadableImageError | OSError) -> None:
        """Leaves an image out, or raises why none is."""
        if self.allowed is None or is_out_of_memory(error):
            raise error
        why = error.why if isinstance(error, UnreadableImageError) else error.strerror or reason(error)
        self.why[number] = why
        self.bad.append(BadImage("", 0, str(self.paths[number]), why))
        self.allowed.check(self.bad)


def _extract_shard(
    model: PlaceModel,
    paths: list[Path],
    config: EvalConfig,
    projection_CK: torch.Tensor | None,
    unreadable: _Unreadable,
    on_progress: OnProgress,
) -> dict[str, torch.Tensor]:
    batches = _image_batches(paths, config, model.spec.patch, unreadable.note)
    found = encode(model, batches, config, lambda i: paths[i], projection_CK, on_progress)
    return shard_of(model, found, range(len(paths)), config, projection_CK)


@torch.inference_mode()
def fit_projection(model: PlaceModel, paths: list[Path], config: EvalConfig) -> torch.Tensor | None:
    """The projection [C, K] that `config` asks for, fitted on a spread of these images; the same on every rank.

    Raises ValueError if K exceeds the channels.
    """
    rerank = config.rerank
    if not rerank.enabled or rerank.project == "none":
        return None
    with on_all_ranks():
        basis_CK = _basis(model, paths, config)
    dist.broadcast(basis_CK, 0)
    return basis_CK


def _basis(model: PlaceModel, paths: list[Path], config: EvalConfig) -> torch.Tensor:
    rerank = config.rerank
    numbers = np.unique(np.linspace(0, len(paths) - 1, min(FIT_IMAGES, len(paths))).astype(int))
    sample = []
    chosen = [paths[i] for i in numbers]
    for _, images_B3HW in _image_batches(chosen, config, model.spec.patch, lambda *_: None):
        _, local_BNC, _ = read_local(model, normalise(images_B3HW.to(model.device)), rerank)
        channels = local_BNC.shape[2]
        if rerank.project_size > channels:
            raise ValueError(f"rerank.project_size {rerank.project_size} exceeds the {channels} channels of the facet")
        if rerank.project == "random":
            return random_basis(channels, rerank.project_size).to(model.device)
        step = -(-local_BNC.shape[1] // FIT_PATCHES_PER_IMAGE)
        sample.append(local_BNC[:, ::step].flatten(0, 1))
    if not sample:
        raise ValueError(f"{chosen[0]}: not a readable image, nor are {len(chosen) - 1} others of the database")
    return pca_basis(torch.cat(sample), rerank.project_size)


def _image_batches(paths: list[Path], config: EvalConfig, patch: int, on_unreadable: OnUnreadable) -> Batches:
    return image_batches(len(paths), lambda i: load_image(paths[i], config, patch), config, on_unreadable)
