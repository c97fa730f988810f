"""A whole training: its sections, and what they must agree on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from configs.registry import BACKBONES
from configs.schema.data import DataConfig
from configs.schema.engine import EngineConfig
from configs.schema.eval import EvalConfig
from configs.schema.loss import LossConfig
from configs.schema.memory import MemoryConfig
from configs.schema.model import ModelConfig
from configs.schema.optim import OptimConfig
from configs.schema.section import NonNegative, Section
from configs.schema.tracking import TrackingConfig
from configs.schema.trainer import TrainerConfig


class Recipe(Section):
    """A whole training: what `rerankvpr train` runs."""

    name: str = Field("run", description="Name of the run.")
    seed: NonNegative = Field(
        0, le=2**32 - 1, description="Seed of the weights, the order of data and the augmentation."
    )
    output: Path = Field(Path("runs/run"), description="Folder for checkpoints, metrics and results.")
    plugins: list[str] = Field(
        default_factory=list,
        description="Code of your own that adds aggregators, backbones, losses, miners, benchmarks or sources: files "
        "(my_vpr.py), installed modules, or entry points of rerankvpr.plugins.",
    )
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        engine, trainer = self.engine, self.trainer
        if self.model.backbone in BACKBONES:  # else it is a plug-in's, which was not run
            self.model.spec.check_side(self.data.image_size, "data.image_size")
            self.model.spec.check_side(self.eval.image_size, "eval.image_size")
        if self.model.frozen_precision == "bf16" and engine.zero_stage == 3 and engine.precision == "fp32":
            raise ValueError(
                "model.frozen_precision bf16 at engine.zero_stage 3 needs engine.precision bf16: DeepSpeed keeps "
                "partitioned weights in one precision"
            )
        if self.loss.guided_weight:
            self._check_guided()
        self._check_sets()
        evaluated = self.eval.benchmarks or self.data.held_out
        if self.optim.schedule == "plateau" and not (trainer.validate_every_epochs and evaluated):
            raise ValueError(
                "optim.schedule plateau needs validations: trainer.validate_every_epochs, and eval.benchmarks or "
                "data.held_out"
            )
        return self

    def _check_guided(self) -> None:
        """Raises ValueError if the guided loss could not train what it reads."""
        key, model, layer = f"loss.guided_weight {self.loss.guided_weight}", self.model, self.eval.rerank.layer
        if self.engine.compile:
            raise ValueError(f"{key}: compiled blocks show no local features; use engine.compile false")
        if model.finetune == "head":
            raise ValueError(f"{key}: model.finetune head trains no block; use last_n_blocks, lora or all")
        if model.finetune == "all" or model.backbone not in BACKBONES:
            return
        depth, trained = model.spec.depth, model.finetune_last_n_blocks
        if -depth <= layer < depth and layer % depth < depth - trained:
            raise ValueError(
                f"{key}: eval.rerank.layer {layer} is block {layer % depth} of {depth}, and blocks from "
                f"{depth - trained} on are trained; raise model.finetune_last_n_blocks to {depth - layer % depth}"
            )

    def _check_sets(self) -> None:
        """Raises ValueError for settings of data sets that nothing could follow."""
        data, weights = self.data, self.loss.set_weights
        if unknown := sorted(set(weights) - set(data.sets)):
            raise ValueError(f"loss.set_weights names {unknown[0]}; data.sets has {', '.join(data.sets) or 'none'}")
        twice = len(set(data.sets.values())) < len(data.sets)
        if twice and self.memory.queue_over == "all" and self.memory.size and not self.memory.min_negative_m:
            raise ValueError(
                "data.sets names a shard set twice, whose places would be negatives of themselves in a queue over all; "
                "use memory.queue_over set, or memory.min_negative_m"
            )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{name!r} is not a plain name; letters, digits, '.', '_' and '-' are")
        return name

    def as_flat(self) -> dict[str, Any]:
        """All keys as `section.key: value`, in schema order."""
        flat: dict[str, Any] = {}

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, Section):
                for key in type(value).model_fields:
                    walk(f"{prefix}{key}.", getattr(value, key))
            else:
                flat[prefix[:-1]] = value

        walk("", self)
        return flat
