"""From tokens to one global descriptor."""

from __future__ import annotations

import torch
from torch import nn


class ClsAggregator(nn.Module):
    """The class token after the final norm."""

    def forward(self, cls_BD: torch.Tensor, patches_BND: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return cls_BD


class GemAggregator(nn.Module):
    """Generalised mean over patch tokens with a learned power (Radenovic et al., TPAMI 2019)."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))
        self.initial_p = p
        self.eps = eps

    def reset_parameters(self) -> None:
        """The power that it starts from."""
        nn.init.constant_(self.p, self.initial_p)

    def forward(self, cls_BD: torch.Tensor, patches_BND: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return patches_BND.clamp(min=self.eps).pow(self.p).mean(dim=1).pow(1 / self.p)


AGGREGATORS: dict[str, type[nn.Module]] = {"cls": ClsAggregator, "gem": GemAggregator}
