"""The network: backbone, aggregator, what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.backbones import BackboneSpec
from configs.registry import AGGREGATORS, BACKBONES
from configs.schema.loss import Argument
from configs.schema.section import NonNegative, Positive, Section, registered

LoraTarget = Literal["q", "k", "v", "qkv", "proj", "mlp"]


class ModelConfig(Section):
    """The network: one ViT and an aggregator."""

    backbone: Annotated[str, registered(BACKBONES)] = Field(
        "vitb14",
        description=f"One of {', '.join(BACKBONES.names())}, or a plug-in's; _reg has registers, tiny is for demos. "
        "RerankVPR's code has vitl14; the field trains ViT-B.",
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
    projection_dim: NonNegative = Field(
        0,
        description="Numbers that descriptors are PCA-whitened to, fitted before the first step and stored with the "
        "network; 0 leaves them as they are.",
    )
    projection_images: Positive = Field(2048, description="Training images that the projection is fitted on.")
    finetune: Literal["all", "last_n_blocks", "lora", "head"] = Field(
        "last_n_blocks",
        description="What is trained: everything; the last blocks and the head; low-rank products beside matrices of "
        "the last blocks, and the aggregator; or the aggregator.",
    )
    finetune_last_n_blocks: NonNegative = Field(
        4, description="Blocks trained, or with LoRA, counted from the last; training all trains the embeddings too."
    )
    lora_rank: Positive = Field(8, description="Rank of LoRA's products.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="LoRA's products count alpha / rank times.")
    lora_targets: list[LoraTarget] = Field(
        default=["q", "v"],
        description="Matrices with LoRA; qkv is one product for all three, proj that of the attention's output.",
    )
    frozen_precision: Literal["same", "bf16"] = Field(
        "same", description="Precision of the frozen blocks and embeddings; same is engine.precision."
    )

    @model_validator(mode="after")
    def _lora_has_targets(self) -> ModelConfig:
        if not self.lora_targets:
            raise ValueError("lora_targets names no matrix; for example [q, v]")
        if "qkv" in self.lora_targets and {"q", "k", "v"} & {*self.lora_targets}:
            raise ValueError("lora_targets: qkv has one product for q, k and v; name it, or those")
        if self.finetune == "lora" and not self.finetune_last_n_blocks:
            raise ValueError("finetune lora needs finetune_last_n_blocks above 0: the blocks that get LoRA")
        return self

    @property
    def spec(self) -> BackboneSpec:
        """The backbone's numbers."""
        return BACKBONES.get(self.backbone)
