"""The class token."""

from __future__ import annotations

import torch

from configs.backbones import BackboneSpec
from model.aggregators.aggregator import Aggregator


class ClsAggregator(Aggregator):
    """The class token after the final norm."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.output_size = spec.channels

    def forward(self, tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # noqa: ARG002
        return tokens_BTC[:, 0]
