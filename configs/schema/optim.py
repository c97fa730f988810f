"""The optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.section import NonNegative, Positive, Section


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adam couples weight decay, sgd has momentum.")
    lr: Annotated[float, Field(gt=0)] = Field(1e-5, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="Weight decay; none on norms, biases.")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment; sgd: momentum.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Decay of the second moment.")
    warmup_steps: NonNegative = Field(200, description="Steps of linear warm-up.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Factor of the rate from each layer to the one below it; 1 gives all layers one rate."
    )
    schedule: Literal["none", "step", "multi_step", "cosine", "cosine_with_restarts", "linear", "exp", "plateau"] = (
        Field(
            "cosine",
            description="Learning rate after warm-up: constant; times gamma every step_size or at each of milestones; "
            "to min_lr_ratio by cosine, once or every step_size, or linearly; times gamma each unit; times gamma if "
            "validations bring no better recall. RerankVPR's code has exp; cosine ends low without a choice of gamma.",
        )
    )
    schedule_unit: Literal["epoch", "step"] = Field(
        "epoch", description="Unit of step_size, milestones and exp: epochs, or optimizer steps."
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.99, description="Factor of step, multi_step, exp and plateau.")
    plateau_evals: Positive = Field(
        2, description="Validations in a row without a better mean recall at the smallest K after which plateau falls."
    )
    step_size: Positive = Field(1, description="Units between falls of step, and in a cycle of cosine_with_restarts.")
    milestones: list[Positive] = Field(default_factory=list, description="Units at which multi_step falls.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Lowest rate of a cosine or line / peak."
    )
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="Global gradient norm limit; 0 is off.")

    @model_validator(mode="after")
    def _multi_step_needs_milestones(self) -> OptimConfig:
        if self.schedule == "multi_step" and not self.milestones:
            raise ValueError("schedule multi_step needs milestones; for example [10, 20]")
        return self
