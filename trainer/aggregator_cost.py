"""What an aggregator costs: counted on tensors without memory, whatever it does, a plug-in's too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import ModelConfig
from model.network import build_aggregator


@dataclass(frozen=True)
class AggregatorCost:
    """Of one image: operations of a forward pass, and bytes that it keeps for the backward pass."""

    flops: float
    kept: float


def aggregator_cost(
    model: ModelConfig, tokens: int, grid: tuple[int, int], dtype: torch.dtype = torch.float32
) -> AggregatorCost:
    """The cost over an image of that many tokens, in that precision. Raises ValueError for too few patches."""
    return _cost(model.model_dump_json(include={"backbone", "aggregator", "aggregator_args"}), tokens, grid, dtype)


@cache
def _cost(about: str, tokens: int, grid: tuple[int, int], dtype: torch.dtype) -> AggregatorCost:
    config = ModelConfig.model_validate_json(about, context={"any_name": True})
    with torch.device("meta"):
        aggregator = build_aggregator(config).to(dtype)
        if aggregator.insertion():  # its work is done by the backbone's blocks
            return AggregatorCost(0.0, 0.0)
        if grid[0] * grid[1] < aggregator.least_patches:
            raise ValueError(
                f"model.aggregator {config.aggregator}: images of {grid[0]} x {grid[1]} patches; it needs "
                f"{aggregator.least_patches} or more"
            )
        tokens_1TC = torch.empty(1, tokens, config.spec.channels, dtype=dtype, requires_grad=True)
        own = {parameter.untyped_storage()._cdata for parameter in aggregator.parameters()}
        own.add(tokens_1TC.untyped_storage()._cdata)  # the backbone's, which it keeps itself
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        # Tensors stay alive until they are counted, so that no two have one storage.
        counter = FlopCounterMode(display=False)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), counter:
            out = aggregator(tokens_1TC, grid)
    assert out.shape == (1, aggregator.output_size)
    return AggregatorCost(float(counter.get_total_flops()), float(sum(kept.values())))
