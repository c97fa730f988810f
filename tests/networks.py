"""Networks for tests, made as the product makes them."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.dinov2 import DinoViT
from model.network import build_model


def backbone(name: str, weights: str = "random") -> DinoViT:
    """The ViT of a recipe's model section, all of it trained."""
    return build_model(ModelConfig.model_validate({"backbone": name, "weights": weights, "finetune": "all"})).backbone
