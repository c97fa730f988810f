"""Generalised mean pooling."""

from __future__ import annotations

import torch
from torch import nn

from configs.backbones import BackboneSpec
from model.aggregators.aggregator import Aggregator, patches_of


class GemAggregator(Aggregator):
    """Generalised mean over patch tokens with a learned power (Radenovic et al., TPAMI 2019), in float32 at least.

    In fp16 the cube of `eps` is 0, and the gradient of its root and of the power are not finite; in bf16 the sum of
    hundreds of cubes would keep three digits.
    """

    def __init__(self, spec: BackboneSpec, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.output_size = spec.channels
        self.p = nn.Parameter(torch.tensor([float(p)]))
        self.initial_p = p
        self.eps = eps

    def reset_parameters(self) -> None:
        """The power that it starts from."""
        nn.init.constant_(self.p, self.initial_p)

    def forward(self, tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        patches_BNC = patches_of(tokens_BTC, grid)
        wide = torch.promote_types(patches_BNC.dtype, torch.float32)
        power = self.p.to(wide)
        return patches_BNC.to(wide).clamp(min=self.eps).pow(power).mean(dim=1).pow(1 / power)
