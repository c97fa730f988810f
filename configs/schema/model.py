"""The network: backbone, aggregator, what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.registry import AGGREGATORS
from configs.schema.section import NonNegative, Section, registered

Backbone = Literal[
    "vits14", "vitb14", "vitl14", "vitg14", "vits14_reg", "vitb14_reg", "vitl14_reg", "vitg14_reg", "tiny14"
]


class ModelConfig(Section):
    """The network: one DINOv2 ViT and an aggregator."""

    backbone: Backbone = Field("vitb14", description="DINOv2 size, with or without registers; tiny14 is for demos.")
    weights: str = Field(
        "timm",
        description="timm: its own download; random; or a file in facebookresearch's key layout (.pth, .safetensors).",
    )
    aggregator: Annotated[str, registered(AGGREGATORS)] = Field(
        "cls", description="Global descriptor: cls, the CLS token; gem, GeM over patch tokens; or a plug-in's."
    )
    finetune: Literal["all", "last_n_blocks", "head"] = Field(
        "last_n_blocks", description="What is trained: everything, the last blocks and the head, or the aggregator."
    )
    finetune_last_n_blocks: NonNegative = Field(
        4, description="Blocks trained, counted from the last; all of them trains the embeddings too."
    )
    frozen_precision: Literal["same", "bf16"] = Field(
        "same", description="Precision of the frozen blocks and embeddings; same is engine.precision."
    )
