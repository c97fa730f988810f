"""How long to train, when to validate and to save."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.section import NonNegative, Positive, Section


class TrainerConfig(Section):
    """How long to train, and what to keep."""

    epochs: Positive = Field(30, description="Epochs.")
    max_steps: NonNegative = Field(0, description="Stop after this many optimizer steps; 0 is no limit.")
    validate_every_epochs: NonNegative = Field(1, description="Epochs between validations; 0 validates never.")
    checkpoint_every_steps: NonNegative = Field(0, description="Steps between checkpoints; 0 is once an epoch.")
    checkpoint_every_s: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        0,
        description="Seconds between checkpoints, besides those by steps; 0 is by steps alone. auto: the interval at "
        "which saves, as long as they take, and steps done twice after a failure cost least in sum (Young and Daly).",
    )
    mean_time_between_failures_s: Annotated[float, Field(ge=0)] = Field(
        0, description="Mean seconds from one failure of the job to the next, for checkpoint_every_s auto."
    )
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
    log_negatives_every: NonNegative = Field(
        0,
        description="Steps between tables of the hardest negatives that the queue gave, with their ages, in "
        "negatives.csv of the output folder (`rerankvpr show negatives`); 0 is never.",
    )
    profile_steps: tuple[NonNegative, NonNegative] | None = Field(
        None,
        description="First and last step (0 is the first) that are traced into profile/ of the output folder, a file "
        "for each rank that ui.perfetto.dev opens: the parts of a step and the memory held.",
    )
    sync_debug: Literal["off", "warn", "error"] = Field(
        "off", description="What torch does where a step makes the host wait for its GPU: nothing, warn, or raise."
    )

    @model_validator(mode="after")
    def _profile_ends_after_it_begins(self) -> TrainerConfig:
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps [{first}, {last}]: expected the first step, then the last")
        return self

    @model_validator(mode="after")
    def _interval_has_its_rate(self) -> TrainerConfig:
        automatic = self.checkpoint_every_s == "auto"
        if automatic != (self.mean_time_between_failures_s > 0):
            raise ValueError(
                "checkpoint_every_s auto and mean_time_between_failures_s, above 0, are given together: the one is "
                "computed from the other"
            )
        return self
