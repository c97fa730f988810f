"""Networks for tests, made as the product makes them."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.backbone import Backbone
from model.network import build_model

# Every aggregator, with arguments that fit images of four patches and the blocks that tests train.
AGGREGATORS: dict[str, dict[str, bool | int | float | str]] = {
    "cls": {},
    "gem": {},
    "salad": {"clusters": 3, "cluster_dim": 8, "token_dim": 8, "hidden": 16},
    "boq": {"channels": 64, "queries": 4, "rows": 2},
    "tokens": {"tokens": 2, "block": -2},
}


def backbone(name: str, weights: str = "random") -> Backbone:
    """The ViT of a recipe's model section, all of it trained."""
    return build_model(ModelConfig.model_validate({"backbone": name, "weights": weights, "finetune": "all"})).backbone
