"""What of the network is trained, and which layer a parameter belongs to."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.aggregators.aggregator import Aggregator
from model.backbone import Backbone
from model.lora import is_lora


def choose_trained(vit: Backbone, aggregator: Aggregator, config: ModelConfig) -> None:
    """Sets `requires_grad` and the number of frozen blocks as `model.finetune` says; the aggregator is always trained.

    Raises ValueError where the choice does not fit the network.
    """
    depth = len(vit.blocks)
    last, has_lora = config.finetune_last_n_blocks, config.finetune == "lora"
    trained = {"all": depth, "last_n_blocks": last, "lora": last, "head": 0}[config.finetune]
    if trained > depth:
        raise ValueError(f"model.finetune_last_n_blocks {trained}: the backbone has {depth} blocks; use 0 to {depth}")
    if config.finetune == "head" and not any(True for _ in aggregator.parameters()):
        raise ValueError(
            f"model.finetune head: the aggregator {config.aggregator} has no parameters, so nothing would be trained; "
            "use last_n_blocks, all, or another aggregator"
        )
    if config.frozen_precision != "same" and trained == depth and not has_lora:
        raise ValueError(f"model.frozen_precision {config.frozen_precision}: no block is frozen; use same")
    vit.num_frozen_blocks = depth - trained
    if trained < depth or has_lora:
        vit.requires_grad_(False)
        vit.blocks[depth - trained :].requires_grad_(not has_lora)
    for name, parameter in vit.named_parameters():
        if is_lora(name):
            parameter.requires_grad_(True)
    vit.norm.requires_grad_(trained > 0 and not has_lora and aggregator.final_norm)
