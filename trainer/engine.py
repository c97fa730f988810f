"""The DeepSpeed engine: what it is told, and the defaults of its own that are undone."""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.schema import EngineConfig, OptimConfig
from model.network import PlaceModel

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
NO_DECAY = ("cls_token", "pos_embed", "reg_token", "agg_token")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by engine.precision
BUCKET = 50_000_000  # elements reduced or gathered at a time; DeepSpeed's own 5e8 is 2 GB a buffer in fp32
OVERLAPPED = 16_000_000  # elements of a bucket that is sent beside backward: above ViT-g's largest parameter
GIVEN_BACK = 1 << 20  # bytes from which ZeRO-3 has glibc return freed memory to the system
LIVE = 100_000_000  # elements that ZeRO-3 keeps whole on a rank: the largest ViT's block has 28e6
LARGEST_WEIGHT = 1e19  # the square of 1.9e19 is infinite in fp32


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trained parameters: matrices with weight decay; norms, biases and embeddings without.

    With `optim.layer_decay` below 1 there is such a pair for each layer, and `lr_scale` in a group is
    layer_decay^(layers above it).
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        above = 0
        if optim.layer_decay < 1:
            assert isinstance(model, PlaceModel)
            above = model.num_layers - 1 - model.layer_of(name)
        decays = whole_ndim(parameter) > 1 and not name.endswith(NO_DECAY)
        group = groups.setdefault(
            (above, not decays),
            {
                "params": [],
                "weight_decay": optim.weight_decay if decays else 0.0,
                "lr_scale": optim.layer_decay**above,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter is trained: raise model.finetune_last_n_blocks, or set model.finetune all")
    return [groups[key] for key in sorted(groups)]


def whole_ndim(parameter: nn.Parameter) -> int:
    """Dimensions of a parameter that ZeRO-3 may have cut into flat partitions."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter that ZeRO-3 may have cut into flat partitions."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def build_optimizer(model: nn.Module, optim: OptimConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trained parameters; `fused` Adam updates them in one kernel."""
    groups = parameter_groups(model, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.beta1)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=fused or None)


def reduce_bucket(engine: EngineConfig) -> int:
    """Elements of gradients that are added up over ranks at a time.

    Smaller where `overlap` sends them beside backward, which hides all buckets but the last.
    """
    return OVERLAPPED if engine.overlap and engine.zero_stage < 3 else BUCKET


def deepspeed_config(engine: EngineConfig, *, gradient_clipping: float, images_per_rank: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping is always explicit: left out, DeepSpeed clips at a norm of 1.

    At stage 0 in fp32 `clip_and_update` clips, which sees whether the gradient is finite before anything is updated.
    """
    if engine.zero_stage == 0 and engine.precision == "fp32":
        gradient_clipping = 0.0
    zero: dict[str, Any] = {
        **{"stage": engine.zero_stage, "reduce_bucket_size": reduce_bucket(engine), "allgather_bucket_size": BUCKET},
    }
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.overlap:
        zero["overlap_comm"] = True
    if engine.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "memory_efficient_linear": False,  # would replace torch's F.linear for the whole process
        }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, images_per_rank // engine.encode_chunks),
        "gradient_accumulation_steps": engine.encode_chunks,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if engine.precision != "fp32" and engine.reduce_precision == "fp32":
        settings["communication_data_type"] = "fp32"
    return settings


def import_deepspeed() -> Any:
    """DeepSpeed's module, quiet, and without the seconds that it would spend on what no recipe uses.

    A fork server calls it too: whatever takes time here belongs before the forks.
    """
    if "DS_ACCELERATOR" not in os.environ:  # a fork server without GPUs does not ask: CUDA would know
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # A kernel for inference on CPU only, which would be compiled in every first run (about 40 s). Asked for by name,
    # the table would be filled by running a compiler, in every start; nothing else in DeepSpeed reads it.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


def _deepspeed(timeout_s: int) -> Any:
    """DeepSpeed, told to bound its groups' operations by `timeout_s`: it would leave them torch's half an hour."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend=dist.get_backend())  # takes the group that is there
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timedelta(seconds=timeout_s))
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, which the engine asks after for every optimizer, without torch.compile.

    Its functions are compiled where they are defined, and that imports the whole compiler: most of a start's seconds,
    and memory of every rank, for an optimizer that no recipe can name.
    """
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda *_args, **_kwargs: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_function


def partitioner(engine: EngineConfig) -> Callable[[nn.Module], None] | None:
    """At ZeRO-3 what leaves this rank its partition of a module's filled parameters; None at other stages."""
    if engine.zero_stage < 3:
        return None
    deepspeed = _deepspeed(engine.collective_timeout_s)
    _give_back_freed_memory()
    config = deepspeed_config(engine, gradient_clipping=0.0, images_per_rank=1)
    dtype = DTYPES[engine.precision]

    def partition(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)  # the engine casts only what is whole
        deepspeed.zero.Init(module=module, config_dict_or_path=config)

    return partition


def _give_back_freed_memory() -> None:
    """Has glibc return freed blocks of `GIVEN_BACK` bytes and more at once.

    By itself it keeps freed tensors of up to 32 MiB in its heap, which weights that are gathered and partitioned again
    cut up: without this, host memory grows over the first steps, by more than a rank's partition of the weights.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)


def build_engine(
    model: nn.Module,
    *,
    engine: EngineConfig,
    optim: OptimConfig,
    images_per_rank: int,
    fused: bool | None = None,
) -> Any:  # deepspeed.DeepSpeedEngine, which ships no types
    """`model` under DeepSpeed with the recipe's optimizer; averages gradients over ranks, as `GlobalLoss` expects.

    DeepSpeed puts the whole network in one precision, so a network's frozen part gets its own back; the blocks are
    compiled if the recipe says so. `fused` is torch's fused Adam: None takes it on GPUs, where it saves launches and
    temporaries, and not on CPUs, where it rounds otherwise.
    """
    deepspeed = _deepspeed(engine.collective_timeout_s)
    optimizer = build_optimizer(model, optim, fused=torch.cuda.is_available() if fused is None else fused)
    config = deepspeed_config(engine, gradient_clipping=optim.gradient_clipping, images_per_rank=images_per_rank)
    built, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if isinstance(model, PlaceModel):
        model.cast_frozen()
        if engine.compile:
            model.compile_blocks()
    return built


def set_learning_rate(engine: Any, lr: float) -> None:
    """Sets the rate of the next step in all parameter groups, each at its layer's scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on all ranks."""

    norm: torch.Tensor | float  # of the whole gradient, before clipping; not finite where nothing was updated
    updated: bool


def clip_and_update(engine: Any, gradient_clipping: float) -> StepResult | None:
    """Ends a micro-batch, and with the last one clips and updates; None before that.

    A gradient that is not finite updates nothing, on any rank: DeepSpeed sees to it where it wraps the optimizer; at
    stage 0 in fp32, where torch's own runs, such a gradient is dropped here.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    if hasattr(engine.optimizer, "overflow"):
        engine.step()
        if not boundary:
            return None
        skipped = bool(engine.optimizer.overflow)
        return StepResult(math.inf if skipped else engine.get_global_grad_norm(), not skipped)
    norm = math.nan
    if boundary:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers leave a parameter without gradient alone
        elif gradient_clipping:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clipping, total)
    engine.step()
    return StepResult(norm, math.isfinite(norm)) if boundary else None


@contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """Inside, every rank may call the module by itself, as often as it likes.

    At ZeRO-3 each call gathers weights from all ranks, which evaluation, where ranks have unequal work, must not do:
    the weights are gathered once and partitioned again at the end. At other stages ranks hold them whole anyway.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        offload._remove_module_hooks()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def weights_are_finite(engine: Any) -> bool:
    """Whether the trained weights of all ranks are numbers that fp32 can compute with; every rank must call this.

    Weights beyond `LARGEST_WEIGHT` count as infinite: their squares are, and what the network makes of an image is NaN.
    """
    mine = [_own_part(p) for p in engine.module.parameters() if p.requires_grad]
    largest = [torch.linalg.vector_norm(part, math.inf, dtype=torch.float32).item() for part in mine if part.numel()]
    spoilt = torch.tensor(float(not all(size <= LARGEST_WEIGHT for size in largest)), device=engine.device)
    dist.all_reduce(spoilt)
    return spoilt.item() == 0


def _own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter's numbers, without what DeepSpeed fills its partition up with, at random."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor
    return part[: max(0, parameter.ds_numel - part.numel() * dist.get_rank())]  # type: ignore[attr-defined]
