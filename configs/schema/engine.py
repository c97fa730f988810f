"""DeepSpeed, precision, and what a process may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.section import Positive, Section

WATCHDOG_SPEAKS_S = 60  # from its limit: four beats of 5 s, and three times 10 s for a store that does not answer


class EngineConfig(Section):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO: 0 replicates, 1 shards the optimizer, 2 gradients as well, 3 weights as well."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="Kept in CPU memory: optimizer (state and update), all (weights as well, at zero_stage 3)."
    )
    activation_checkpointing: bool = Field(
        False, description="Trained blocks are run again in the backward pass instead of being kept."
    )
    compile: bool = Field(False, description="Blocks through torch.compile; the first step takes minutes.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Precision of the forward and backward pass. RerankVPR's code has fp16; fp32 runs anywhere, and "
        "recipes for GPUs say bf16, which needs no loss scaling.",
    )
    reduce_precision: Literal["fp32", "same"] = Field(
        "fp32",
        description="Precision in which gradients add up over ranks; same is engine.precision: half the bytes, and of "
        "bf16 an error of 1 % at 64 ranks, 3 % and more at 1,024.",
    )
    overlap: bool = Field(
        False,
        description="Gradients add up over ranks while backward runs, in smaller buckets, of which two are held; at "
        "zero_stage 1 and 2 (3 always does).",
    )
    tf32: bool = Field(
        False, description="fp32 products on NVIDIA's TF32 units: faster, and rounded to 10 bits of mantissa."
    )
    encode_chunks: Positive = Field(
        1,
        description="Chunks in which a rank encodes its images, for a batch that does not fit: a second forward "
        "pass, the gradient of the whole batch (GradCache). RerankVPR's factor 2 averages losses of small batches.",
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak TFLOP/s of a rank's device, which train/mfu is a share of; None: known GPUs alone."
    )
    timeout_s: Annotated[int, Field(ge=10)] = Field(
        600,
        description="Seconds that the first step and an evaluation may stand still, and that a collective operation "
        "may take, before the job ends; a collective gets a minute more where stall_s names who stalled.",
    )
    stall_s: Annotated[float, Field(ge=0)] = Field(
        300,
        description="Seconds without progress (in data, forward, loss, step, save or evaluation) after which the job "
        "ends and the rank that stalled is named; 0 is never, and above timeout_s collectives end first, unnamed.",
    )

    @property
    def collective_timeout_s(self) -> int:
        """Seconds that a collective may take: NCCL aborts the process then, so the watchdog must have spoken before."""
        return self.timeout_s + WATCHDOG_SPEAKS_S if 0 < self.stall_s <= self.timeout_s else self.timeout_s

    @model_validator(mode="after")
    def _deepspeed_can_do_it(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 at zero_stage 0 departs from fp32 in DeepSpeed 0.19; use zero_stage 1 or 2")
        if self.overlap and self.zero_stage == 0:
            raise ValueError("overlap needs zero_stage 1 or 2; at 0 DeepSpeed reduces gradients after backward")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3; DeepSpeed ignores it at 0")
        if self.offload == "all" and self.zero_stage < 3:
            raise ValueError("offload all needs zero_stage 3, where weights are partitioned; or use offload optimizer")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile at zero_stage 3 can lose gradients in DeepSpeed; use zero_stage 2, or compile false"
            )
        return self
