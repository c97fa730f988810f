"""Descriptors and local features of a rank's slice of images, from one forward pass each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import EvalConfig
from data_pipeline.images import normalise, read_image
from model.network import PlaceModel


@dataclass(frozen=True)
class Features:
    """What a rank keeps of images start to start + I, on the model's device."""

    start: int
    descriptors_ID: torch.Tensor  # float32, L2-normalised
    local_INC: torch.Tensor | None  # float16, L2-normalised; None where nothing is re-ranked
    salient_IN: torch.Tensor | None  # bool


def slice_bounds(num_items: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and past-the-last item of a rank's contiguous slice; slices differ by one item at most."""
    return num_items * rank // world_size, num_items * (rank + 1) // world_size


def salient(saliency_BN: torch.Tensor, thresh: float | None) -> torch.Tensor:
    """Patches whose saliency, min-max normalised in each image, exceeds `thresh` (bool [B, N]); None keeps all."""
    if thresh is None:
        return torch.ones_like(saliency_BN, dtype=torch.bool)
    low_B1, high_B1 = saliency_BN.amin(dim=1, keepdim=True), saliency_BN.amax(dim=1, keepdim=True)
    spread_B1 = (high_B1 - low_B1).clamp(min=torch.finfo(saliency_BN.dtype).tiny)
    return (saliency_BN - low_B1) / spread_B1 > thresh


@torch.inference_mode()
def extract(
    model: PlaceModel,
    paths: list[Path],
    config: EvalConfig,
    *,
    rank: int,
    world_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of this rank's slice of `paths`; `on_progress` gets the number of images done on this rank."""
    start, stop = slice_bounds(len(paths), rank, world_size)
    rerank, device = config.rerank, model.device
    descriptors, local, masks = [], [], []
    done = 0
    for images_B3HW in _image_batches(paths[start:stop], config):
        inputs = normalise(images_B3HW.to(device, non_blocking=True))
        if rerank.enabled:
            out = model.read_out(inputs, layer=rerank.layer, facet=rerank.facet, saliency_layer=rerank.saliency_layer)
            descriptors.append(out.descriptor_BD)
            local.append(out.local_BNC.half())
            masks.append(salient(out.saliency_BN, rerank.saliency_thresh))
        else:
            descriptors.append(model(inputs))
        if not descriptors[-1].isfinite().all():
            broken = paths[start + done + int(descriptors[-1].isfinite().all(dim=1).int().argmin())]
            raise ValueError(f"{broken}: the descriptor is not finite; are the weights?")
        done += len(inputs)
        if on_progress:
            on_progress(done)
    if not descriptors:  # more ranks than images
        patches = (config.image_size // model.backbone.patch_embed.patch_size[0]) ** 2
        descriptors = [torch.zeros(0, model.descriptor_size, device=device)]
        local = [torch.zeros(0, patches, int(model.backbone.embed_dim), dtype=torch.float16, device=device)]
        masks = [torch.zeros(0, patches, dtype=torch.bool, device=device)]
    return Features(
        start,
        torch.cat(descriptors),
        torch.cat(local) if rerank.enabled else None,
        torch.cat(masks) if rerank.enabled else None,
    )


def _image_batches(paths: list[Path], config: EvalConfig) -> Iterator[torch.Tensor]:
    """uint8 batches in order, read two batches ahead."""
    batches = [paths[i : i + config.batch_size] for i in range(0, len(paths), config.batch_size)]
    with ThreadPoolExecutor(config.decode_threads, thread_name_prefix="read") as pool:
        waiting: deque[list[Future[torch.Tensor]]] = deque()
        try:
            for batch in batches:
                waiting.append([pool.submit(read_image, path, config.image_size) for path in batch])
                if len(waiting) > 2:
                    yield torch.stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield torch.stack([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
