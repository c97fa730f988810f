"""The memory queue, the weight of what is in it, and how its drift is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.section import NonNegative, Positive, Section


class MemoryConfig(Section):
    """The memory queue of past descriptors."""

    size: NonNegative = Field(
        16384,
        description="M, descriptors kept over all ranks, from epoch to epoch (RerankVPR's code empties its queue after "
        "each); 0 switches the queue off.",
    )
    start_epoch: Annotated[float, Field(ge=0)] = Field(
        5, description="Epoch (from 0; a fraction is a part of one) from which the queue is filled and used."
    )
    placement: Literal["replicated", "sharded"] = Field(
        "replicated", description="replicated: each rank keeps all M; sharded: M over ranks, the same loss."
    )
    in_batch: Literal["live", "detached"] = Field(
        "live", description="Gradient inside the batch: both sides of a pair, or the anchor's alone (CrossBatchMemory)."
    )
    decay: Literal["exponential", "measured"] = Field(
        "exponential", description="Age weight of a memory negative: exp(-decay_lambda * steps), or measured drift."
    )
    decay_lambda: Annotated[float, Field(ge=0)] = Field(
        0.1,
        description="Larger forgets faster: half the weight is gone after 0.69 / lambda steps; 0 is no decay. "
        "RerankVPR's README says the reverse of its code.",
    )
    queue_over: Literal["set", "all"] = Field(
        "set",
        description="data.composition sets: whether a set's images meet the queue's entries of their set or of all; "
        "set divides M as data.set_places does.",
    )
    min_negative_m: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Metres: two places nearer than this are no negatives of each other, in batch and queue, over all "
        "sets; 0 spares none. Needs coordinates in the index.",
    )
    drift_every: NonNegative = Field(
        0, description="Steps between measurements of the queue's drift (stored images encoded again); 0 is never."
    )
    drift_images: Positive = Field(32, description="Images encoded again in a measurement, over all ranks and ages.")
    tile_mb: Positive = Field(256, description="Bound in MiB on what a rank's similarities and their gradient hold.")

    @model_validator(mode="after")
    def _measured_needs_measurements(self) -> MemoryConfig:
        if self.decay == "measured" and not self.drift_every:
            raise ValueError("decay measured needs drift_every, the steps between measurements; for example 50")
        return self
