"""Compact local features: salient patches alone, projected, in fp32, fp16 or int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configs.schema import RerankConfig
from model.facets import FacetReader, log_bin
from model.network import PlaceModel

NO_CELL = 255  # row and column of the class token, which has no place on the grid


@dataclass(frozen=True)
class LocalFeatures:
    """Kept patches of I images, one image after another."""

    count_I: torch.Tensor  # int64
    codes_PC: torch.Tensor  # float32, float16 or int8
    scale_P: torch.Tensor  # float32, the factor of int8 codes; ones for the others
    cell_P2: torch.Tensor  # uint8, row and column of the patch grid
    saliency_P: torch.Tensor  # float16, min-max normalised in the image


def min_max(saliency_BN: torch.Tensor) -> torch.Tensor:
    """Saliency scaled to [0, 1] in each image; a constant map is 0."""
    low_B1, high_B1 = saliency_BN.amin(dim=1, keepdim=True), saliency_BN.amax(dim=1, keepdim=True)
    return (saliency_BN - low_B1) / (high_B1 - low_B1).clamp(min=torch.finfo(saliency_BN.dtype).tiny)


def salient(saliency_BN: torch.Tensor, thresh: float | None) -> torch.Tensor:
    """Patches whose saliency, min-max normalised in each image, exceeds `thresh` (bool [B, N]); None keeps all."""
    if thresh is None:
        return torch.ones_like(saliency_BN, dtype=torch.bool)
    return min_max(saliency_BN) > thresh


def read_local(
    model: PlaceModel, inputs_B3HW: torch.Tensor, config: RerankConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Descriptors [B, D], local features [B, N, C] and saliency [B, N] of one forward pass, log-binned if asked for."""
    reader = facet_reader(model, config)
    rows, columns = grid_of(model, inputs_B3HW)
    with reader.attached(rows * columns):
        descriptor_BD = model(inputs_B3HW)
    local_BNC = reader.local_BNC
    if config.hierarchy:
        local_BNC = log_bin(local_BNC, (rows, columns), config.hierarchy)
    return descriptor_BD, local_BNC, reader.saliency_BN


def facet_reader(model: PlaceModel, config: RerankConfig) -> FacetReader:
    """What reads the local features of a forward pass. Raises ValueError for blocks that the backbone does not have."""
    return FacetReader(
        model.backbone,
        layer=config.layer,
        facet=config.facet,
        saliency_layer=config.saliency_layer,
        saliency=config.saliency,
        include_cls=config.include_cls,
    )


def grid_of(model: PlaceModel, inputs_B3HW: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    return model.spec.grid(inputs_B3HW.shape[2], inputs_B3HW.shape[3])


def compact(
    local_BNC: torch.Tensor,
    saliency_BN: torch.Tensor,
    grid: tuple[int, int],
    config: RerankConfig,
    projection_CK: torch.Tensor | None = None,
) -> LocalFeatures:
    """The salient patches of a batch, projected and stored as `config` says; L2-normalised before rounding.

    int8 codes are rounded to 127 steps of the patch's own largest channel.
    """
    scaled_BN, keep_BN = min_max(saliency_BN), salient(saliency_BN, config.saliency_thresh)
    rows, columns = grid
    index_N = torch.arange(rows * columns, device=local_BNC.device)
    cell_N2 = torch.stack([index_N // columns, index_N % columns], dim=1).to(torch.uint8)
    if config.include_cls:
        scaled_BN, keep_BN = F.pad(scaled_BN, (1, 0), value=1.0), F.pad(keep_BN, (1, 0), value=True)
        cell_N2 = torch.cat([torch.full_like(cell_N2[:1], NO_CELL), cell_N2])
    codes_PC, scale_P = encode(local_BNC[keep_BN].float(), config.dtype, projection_CK)
    cell_P2 = cell_N2.expand(len(keep_BN), -1, -1)[keep_BN]
    return LocalFeatures(keep_BN.sum(dim=1), codes_PC, scale_P, cell_P2, scaled_BN[keep_BN].half())


def encode(
    local_PC: torch.Tensor, store: str, projection_CK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `store`'s type and the factor of each patch, after projection and L2 normalisation."""
    if projection_CK is not None:
        local_PC = F.normalize(local_PC @ projection_CK, dim=-1)
    scale_P = torch.ones(len(local_PC), device=local_PC.device)
    if store == "int8":
        scale_P = local_PC.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (local_PC / scale_P[:, None]).round().clamp(-127, 127).to(torch.int8), scale_P
    return (local_PC if store == "fp32" else local_PC.half()), scale_P


def pca_basis(sample_SC: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` uncentred principal axes [C, size] of a sample: they keep most of its inner products."""
    _, vectors_CC = torch.linalg.eigh(sample_SC.double().T @ sample_SC.double())
    return vectors_CC.flip(1)[:, :size].float().contiguous()


def random_basis(channels: int, size: int) -> torch.Tensor:
    """`size` orthonormal random directions [C, size], always the same ones."""
    noise = torch.randn(channels, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q.float().contiguous()
