"""PCA-whitening of descriptors, fitted once and stored with the network."""

from __future__ import annotations

import torch
from torch import nn

from model.backbone import without_autocast

SMALLEST = 1e-6  # of a variance, as a share of the largest: below it a direction is noise


class Projection(nn.Module):
    """Descriptors less their mean, along their principal axes, each of variance 1 (Jegou and Chum, ECCV 2012).

    Not trained. Before it is fitted it takes the first numbers as they are.
    """

    def __init__(self, size: int, output_size: int) -> None:
        super().__init__()
        if output_size > size:
            raise ValueError(f"model.projection_dim {output_size}: descriptors have {size} numbers")
        self.output_size = output_size
        self.mean = nn.Parameter(torch.empty(size), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(output_size, size), requires_grad=False)

    def reset_parameters(self) -> None:
        """The first numbers."""
        nn.init.zeros_(self.mean)
        nn.init.eye_(self.weight)

    def forward(self, descriptor_BD: torch.Tensor) -> torch.Tensor:
        """L2-normalised descriptors [B, D] -> [B, K], in float32 at least."""
        wide = torch.promote_types(descriptor_BD.dtype, torch.float32)
        with without_autocast(descriptor_BD):
            return (descriptor_BD.to(wide) - self.mean.to(wide)) @ self.weight.to(wide).T


def whitening(sample_ND: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and whitening matrix [size, D] of a sample, in float32; computed in float64.

    Raises ValueError if the sample spans fewer directions.
    """
    mean_D = sample_ND.double().mean(dim=0)
    centred_ND = sample_ND.double() - mean_D
    count, channels = centred_ND.shape
    if count <= channels:  # the axes of N samples follow from their N x N products
        variance_N, mix_NN = torch.linalg.eigh(centred_ND @ centred_ND.T / (count - 1))
        axes_DN = centred_ND.T @ mix_NN / ((count - 1) * variance_N.clamp(min=1e-300)).sqrt()
    else:
        variance_N, axes_DN = torch.linalg.eigh(centred_ND.T @ centred_ND / (count - 1))
    spanned = int((variance_N > SMALLEST * variance_N[-1]).sum())
    if spanned < size:
        raise ValueError(
            f"model.projection_dim {size}: {count} training images span {spanned} directions; use at most {spanned}, "
            "or more images (model.projection_images)"
        )
    axes_Dk, variance_k = axes_DN.flip(1)[:, :size], variance_N.flip(0)[:size]
    sign_k = 1 - 2 * (axes_Dk.sum(dim=0) < 0).double()  # an axis points either way
    return mean_D.float(), (axes_Dk * sign_k / variance_k.sqrt()).T.float().contiguous()
