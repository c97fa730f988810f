"""From tokens to one global descriptor; a line of AGGREGATORS in configs/registry.py makes one known by name."""

from __future__ import annotations

import torch
from torch import nn


class ClsAggregator(nn.Module):
    """The class token after the final norm."""

    def forward(self, cls_BD: torch.Tensor, patches_BND: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return cls_BD


class GemAggregator(nn.Module):
    """Generalised mean over patch tokens with a learned power (Radenovic et al., TPAMI 2019), in float32 at least.

    In fp16 the cube of `eps` is 0, and the gradient of its root and of the power are not finite; in bf16 the sum of
    hundreds of cubes would keep three digits.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))
        self.initial_p = p
        self.eps = eps

    def reset_parameters(self) -> None:
        """The power that it starts from."""
        nn.init.constant_(self.p, self.initial_p)

    def forward(self, cls_BD: torch.Tensor, patches_BND: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        wide = torch.promote_types(patches_BND.dtype, torch.float32)
        power = self.p.to(wide)
        return patches_BND.to(wide).clamp(min=self.eps).pow(power).mean(dim=1).pow(1 / power)
