"""The forward pass of an evaluation: pixels in; descriptors and, for re-ranking, local features and saliency out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.schema import EvalConfig
from data_pipeline.images import normalise
from eval.local_features import LocalFeatures, compact, grid_of, read_local
from model.network import PlaceModel


@dataclass(frozen=True)
class Encoded:
    """What one pass gives of B images; `local` is None without re-ranking."""

    descriptor_BD: torch.Tensor  # of the network's type
    local: LocalFeatures | None
    grid: tuple[int, int]  # rows and columns of patches


@torch.inference_mode()
def encode_images(
    model: PlaceModel, images_B3HW: torch.Tensor, config: EvalConfig, projection_CK: torch.Tensor | None = None
) -> Encoded:
    """One forward pass of uint8 images [B, 3, H, W] of any device, in the precision of `config`."""
    inputs = normalise(images_B3HW.to(model.device, non_blocking=True))
    local = None
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        if config.rerank.enabled:
            descriptor_BD, local_BNC, saliency_BN = read_local(model, inputs, config.rerank)
        else:
            descriptor_BD = model(inputs)
    grid = grid_of(model, inputs)
    if config.rerank.enabled:
        local = compact(local_BNC, saliency_BN.float(), grid, config.rerank, projection_CK)
    return Encoded(descriptor_BD, local, grid)
