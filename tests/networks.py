"""Networks for tests, made as the product makes them."""

from __future__ import annotations

import functools
from dataclasses import replace

from configs.registry import BACKBONES
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
SPECK = "speck14"  # files of kilobytes: a mutation takes milliseconds, and meets their headers often


def backbone(name: str, weights: str = "random") -> Backbone:
    """The ViT of a recipe's model section, all of it trained."""
    return build_model(ModelConfig.model_validate({"backbone": name, "weights": weights, "finetune": "all"})).backbone


@functools.cache
def speck() -> ModelConfig:
    """The model section of a network of one block of 8 channels, known as the built-in ones are in this process."""
    spec = replace(BACKBONES.get("tiny14"), channels=8, depth=1, hidden=32, table_side=28)
    BACKBONES._known[SPECK] = spec  # a plug-in's would be run at each build, to hold it against its spec
    return ModelConfig.model_validate({"backbone": SPECK, "weights": "random", "finetune_last_n_blocks": 1})
