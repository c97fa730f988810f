"""How long to train, when to validate and to save."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from configs.schema.section import NonNegative, Positive, Section


class TrainerConfig(Section):
    """How long to train, and what to keep."""

    epochs: Positive = Field(30, description="Epochs.")
    max_steps: NonNegative = Field(0, description="Stop after this many optimizer steps; 0 is no limit.")
    validate_every_epochs: NonNegative = Field(1, description="Epochs between validations; 0 validates never.")
    checkpoint_every_steps: NonNegative = Field(0, description="Steps between checkpoints; 0 is once an epoch.")
    keep_last: Positive = Field(2, description="Newest checkpoints kept, besides the best one.")
    early_stop_evals: NonNegative = Field(
        0, description="Validations without a better mean recall at the smallest K after which a run ends; 0 is never."
    )
    max_skipped_steps: NonNegative = Field(
        10, description="Steps skipped for a loss or gradient that is not finite before the run stops."
    )
    save_retry_s: Annotated[float, Field(ge=0)] = Field(
        600, description="Seconds that the last checkpoint is tried again where the disk is full or gone."
    )
    log_every_steps: Positive = Field(1, description="Steps between logged metrics.")
