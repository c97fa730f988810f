"""Learned tokens that the last blocks fill with the place (ImAge, Lu et al., NeurIPS 2025)."""

from __future__ import annotations

import torch
from torch import nn

from configs.backbones import BackboneSpec
from model.aggregators.aggregator import Aggregator
from model.backbone import Insertion


class LearnedTokens(Aggregator):
    """`tokens` learned tokens that join the sequence before `block`, and after the final norm are the descriptor.

    `tokens` * channels numbers; a negative `block` counts from the last. The published setting is the first of the
    trained blocks, which are the last four.
    """

    def __init__(self, spec: BackboneSpec, tokens: int = 8, block: int = -4) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens {tokens}: expected 1 or more")
        if not -spec.depth <= block < spec.depth:
            raise ValueError(
                f"block {block}: the backbone has {spec.depth} blocks; use {-spec.depth} to {spec.depth - 1}"
            )
        self.output_size = tokens * spec.channels
        self.tokens = _Tokens(tokens, spec.channels)
        self.block, self.first = block % spec.depth, spec.num_prefix_tokens

    def forward(self, tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return tokens_BTC[:, self.first : -grid[0] * grid[1]].flatten(1)

    def insertion(self) -> Insertion:
        """The learned tokens, at their block."""
        return Insertion(self.block, self.tokens)


class _Tokens(nn.Module):
    """Puts learned tokens into a sequence; a module, so that ZeRO-3 gathers them where they are used."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.agg_token = nn.Parameter(torch.empty(1, count, channels))

    def reset_parameters(self) -> None:
        """Drawn as DINOv2 draws its class token."""
        nn.init.normal_(self.agg_token, std=1e-6)

    def forward(self, x_BTC: torch.Tensor, before: int) -> torch.Tensor:
        """The sequence with the learned tokens after its first `before`."""
        learned_BAC = self.agg_token.to(x_BTC.dtype).expand(x_BTC.shape[0], -1, -1)
        return torch.cat([x_BTC[:, :before], learned_BAC, x_BTC[:, before:]], dim=1)
