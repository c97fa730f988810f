"""What every aggregator is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from model.backbone import Insertion


class Aggregator(nn.Module):
    """Tokens in, one descriptor out; the network L2-normalises it.

    A subclass takes the backbone's spec first, and arguments of its own (`model.aggregator_args`); it sets
    `output_size` and has `forward`. Parameters belong to linear modules, or to modules with `reset_parameters`.
    """

    output_size: int  # numbers of a descriptor
    least_patches: int = 1  # that an image must have
    final_norm: ClassVar[bool] = True  # whether tokens come after the backbone's last norm

    def forward(self, tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Descriptors [B, output_size] from tokens: the class token first, rows * columns patches last."""
        raise NotImplementedError

    def insertion(self) -> Insertion | None:
        """Tokens of its own that it puts among the backbone's."""
        return None

    @classmethod
    def from_authors(cls, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keys and shapes of this module from those of the method's own checkpoints; its own stay."""
        return dict(state)


def patches_of(tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The patches [B, N, C] in row order."""
    return tokens_BTC[:, -grid[0] * grid[1] :]
