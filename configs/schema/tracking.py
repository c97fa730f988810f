"""MLflow."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, model_validator

from configs.schema.section import Section


class TrackingConfig(Section):
    """MLflow."""

    uri: str = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db",
        description="MLflow store or server; where neither recipe nor flag names one, MLFLOW_TRACKING_URI does.",
    )
    experiment: str = Field("rerankvpr", description="MLflow experiment.")
    enabled: bool = Field(
        True, description="Send to MLflow; metrics.jsonl in the output folder has it anyway, for rerankvpr sync."
    )
    system_metrics_every_s: Annotated[float, Field(ge=0)] = Field(
        10.0, description="Seconds between samples of CPU, memory, disk, network and GPUs of rank 0's host; 0 is never."
    )
    log_model: bool = Field(True, description="Log the best network to MLflow at the end: a copy of its weights there.")
    register_as: str = Field("", description="Name in MLflow's registry that the best network becomes a version of.")

    @model_validator(mode="after")
    def _registering_needs_a_model(self) -> TrackingConfig:
        if self.register_as and not self.log_model:
            raise ValueError("register_as needs log_model True")
        return self
