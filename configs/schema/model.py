"""The network: backbone, aggregator, what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.backbones import BackboneSpec
from configs.registry import AGGREGATORS, BACKBONES
from configs.schema.loss import Argument
from configs.schema.section import NonNegative, Section, registered


class ModelConfig(Section):
    """The network: one ViT and an aggregator."""

    backbone: Annotated[str, registered(BACKBONES)] = Field(
        "vitb14",
        description=f"One of {', '.join(BACKBONES.names())}, or a plug-in's; _reg has registers, tiny is for demos.",
    )
    weights: str = Field(
        "timm",
        description="timm: its own download; random; or a file in facebookresearch's key layout (.pth, .safetensors).",
    )
    aggregator: Annotated[str, registered(AGGREGATORS)] = Field(
        "cls",
        description="Global descriptor: cls, the CLS token; gem, GeM over patch tokens; salad; boq; tokens, learned "
        "ones; or a plug-in's.",
    )
    aggregator_args: dict[str, Argument] = Field(
        default_factory=dict, description="The aggregator's own arguments; docs/training.md has a table."
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

    @property
    def spec(self) -> BackboneSpec:
        """The backbone's numbers."""
        return BACKBONES.get(self.backbone)
