"""The DeepSpeed engine: what it is told, and the defaults of its own that are undone."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from configs.schema import EngineConfig, OptimConfig

NO_DECAY = ("cls_token", "pos_embed", "reg_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with weight decay; norms, biases and embeddings without."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter is trained: raise model.finetune_last_n_blocks")
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(NO_DECAY)]
    plain = [p for name, p in trained if p.ndim <= 1 or name.endswith(NO_DECAY)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trained parameters."""
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.beta1)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))


def deepspeed_config(engine: EngineConfig, *, gradient_clipping: float, images_per_rank: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping is always explicit: left out, DeepSpeed clips at a norm of 1."""
    return {
        "train_micro_batch_size_per_gpu": max(1, images_per_rank // engine.gradient_accumulation),
        "gradient_accumulation_steps": engine.gradient_accumulation,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {"stage": engine.zero_stage},
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def build_engine(
    model: nn.Module, *, engine: EngineConfig, optim: OptimConfig, images_per_rank: int
) -> Any:  # deepspeed.DeepSpeedEngine, which ships no types
    """`model` under DeepSpeed with the recipe's optimizer; averages gradients over ranks, as `GlobalLoss` expects."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # A kernel for inference on CPU only, which would be compiled in every first run (about 40 s).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = build_optimizer(model, optim)
    config = deepspeed_config(engine, gradient_clipping=optim.gradient_clipping, images_per_rank=images_per_rank)
    built, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return built


def set_learning_rate(engine: Any, lr: float) -> None:
    """Sets the rate of the next step in all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(engine: Any) -> float | None:
    """Ends a micro-batch, and with the last one updates; the norm of the gradient before clipping, then.

    DeepSpeed keeps that norm from stage 1 on; at stage 0 it is taken from the averaged gradients.
    """
    norm = None
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
    engine.step()
    kept = engine.get_global_grad_norm() if norm is None else norm
    return None if kept is None else float(kept)
