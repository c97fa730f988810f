"""The engine's state by parameter name: one set of files for any world size, ZeRO stage and offload, and no pickle.

DeepSpeed's own checkpoints hold flat partitions, which resume at the world size and stage that wrote them alone. Here
each parameter's weight, fp32 master and moments are put together one at a time, whole, and kept by one rank of all,
so that a rank holds and writes 1/W of them; they are handed back to whatever partitions the resuming engine has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from configs.reading import reading

Tensors = dict[str, torch.Tensor]
Numbers = dict[str, dict[str, float]]  # step counts, and numbers of the loss scaler


@dataclass(frozen=True)
class EngineState:
    """This rank's share of an engine's state, in CPU memory of its own."""

    weights: Tensors  # fp32, by parameter name; buffers are rank 0's
    optimizer: Tensors  # `name:key`, key being a moment or `master`
    numbers: str  # JSON: step counts and loss scaler, the same on all ranks


def take_state(engine: Any) -> EngineState:
    """A copy of the engine's state, each parameter on one rank. Every rank must call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_states(engine)
    keys, rank = _state_keys(engine), dist.get_rank()
    weights: Tensors = {}
    optimizer: Tensors = {}
    named = list(engine.module.named_parameters())
    kept_by = keepers([(math.prod(_shape(p)), p.requires_grad) for _, p in named], dist.get_world_size())
    for (name, parameter), keeper in zip(named, kept_by, strict=True):
        mine = keeper == rank
        with _whole(parameter):
            if mine:
                weights[name] = _copy(parameter)
        if not parameter.requires_grad:
            continue
        for key in keys:
            if _is_wrapped(engine):
                state = safe_get_full_optimizer_state(parameter, key)
            else:
                state = engine.optimizer.state[parameter][key]
            if mine:
                optimizer[f"{name}:{key}"] = _copy(state).view(_shape(parameter))
        if parameter.dtype != torch.float32:
            master = safe_get_full_fp32_param(parameter)
            if mine:
                optimizer[f"{name}:master"] = _copy(master).view(_shape(parameter))
    if rank == 0:
        weights |= {name: _copy(buffer) for name, buffer in _buffers(engine.module)}
    return EngineState(weights, optimizer, json.dumps({"counts": _counts(engine), "scaler": _scaler(engine)}))


def keepers(parameters: Sequence[tuple[int, bool]], ranks: int) -> list[int]:
    """The rank that keeps each parameter of (elements, whether trained), so that all keep about equally much.

    A trained one counts three times, for its moments; the largest go first, each to the rank that has least.
    """
    sizes = [numel * (3 if trained else 1) for numel, trained in parameters]
    kept, out = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        out[i] = kept.index(min(kept))
        kept[out[i]] += sizes[i]
    return out


def read_numbers(text: str) -> Numbers:
    """`EngineState.numbers` as values. Raises an error of some kind on anything else."""
    described = json.loads(text)
    numbers: Numbers = {kind: dict(described[kind]) for kind in ("counts", "scaler")}
    for name, value in (numbers["counts"] | numbers["scaler"]).items():
        if not isinstance(value, bool | int | float):
            raise ValueError(f"{name} is {value!r:.40}, not a number")
    return numbers


def put_state(
    engine: Any,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    numbers: Numbers,
    forward: Any,
) -> None:
    """Puts a whole state, as all ranks together took it, into an engine of any layout. Every rank must call this.

    `forward` runs the network on anything and returns a tensor of it: a step at rate 0 lets the engine lay out its
    state. Raises ValueError where a moment that this optimizer has was not saved.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    _lay_out(engine, forward)
    for name, parameter in engine.module.named_parameters():
        write_weight(parameter, weights[name])
    for name, buffer in _buffers(engine.module):
        buffer.copy_(weights[name])
    # A checkpoint from before any update has no moments: they are 0.
    stepped = any(not name.endswith(":master") for name in optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_wrapped(engine):
            key = f"{name}:master"
            master = optimizer[key] if key in optimizer else weights[name]
            if _is_partitioned(parameter):
                safe_set_local_fp32_param(parameter, _partition_of(master, parameter))
            else:
                safe_set_full_fp32_param(parameter, master.to(parameter.device, torch.float32))
        for key in _state_keys(engine) if stepped else ():
            if f"{name}:{key}" not in optimizer:
                raise ValueError(f"the checkpoint has no {key} of {name}; it was written by another optimizer")
            state = optimizer[f"{name}:{key}"]
            if _is_partitioned(parameter):
                safe_set_local_optimizer_state(parameter, _partition_of(state, parameter), key)
            elif _is_wrapped(engine):
                safe_set_full_optimizer_state(parameter, state.to(parameter.device), key)
            else:
                engine.optimizer.state[parameter][key].copy_(state)
    for state_of in _inner(engine).state.values():
        for key in [key for key, x in state_of.items() if torch.is_tensor(x) and not x.ndim]:
            state_of[key].fill_(numbers["counts"].get(key, 0.0))
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for key, value in numbers["scaler"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def write_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Gives a parameter in the engine its value, not the optimizer's copy of it. Every rank must call this."""
    with _whole(parameter, written=True):
        if not _is_partitioned(parameter) or dist.get_rank() == 0:  # of a partitioned one, the others get rank 0's
            parameter.data.copy_(value)


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of several safetensors files as one mapping, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._of: dict[str, tuple[Path, Any]] = {}
        for path in files:
            with reading(path, "a whole file of tensors"):
                file = safe_open(path, framework="pt")
                self._of |= dict.fromkeys(file.keys(), (path, file))

    def __getitem__(self, name: str) -> torch.Tensor:
        path, file = self._of[name]
        with reading(path, "a whole file of tensors"):
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _lay_out(engine: Any, forward: Callable[[], torch.Tensor]) -> None:
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(forward().float().sum() * 0)
        engine.step()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _link_states(engine)


def _buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that a state dict has: others follow from the network's sizes."""
    stored = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in stored]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut this parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _whole(parameter: torch.nn.Parameter, *, written: bool = False) -> AbstractContextManager[None]:
    """The parameter whole on every rank, for the length of a `with`; `written` by rank 0 inside."""
    if not _is_partitioned(parameter):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0 if written else None
    )
    return gathered


def _partition_of(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part of a tensor that belongs to a partitioned parameter; the last part is filled up with zeros."""
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    padded = whole.new_zeros(size * dist.get_world_size(), dtype=torch.float32)
    padded[: whole.numel()] = whole.flatten()
    return padded[size * dist.get_rank() : size * (dist.get_rank() + 1)]


def _is_wrapped(engine: Any) -> bool:
    """Whether DeepSpeed wraps the optimizer; at stage 0 in fp32 it is torch's own, on the parameters themselves."""
    return hasattr(engine.optimizer, "optimizer")


def _inner(engine: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = engine.optimizer.optimizer if _is_wrapped(engine) else engine.optimizer
    return inner


def _state_keys(engine: Any) -> list[str]:
    """Names of the states that are as large as the parameters (exp_avg...), the same for all; none before a step."""
    states = _inner(engine).state.values()
    return sorted({key for state in states for key, x in state.items() if torch.is_tensor(x) and x.ndim})


def _counts(engine: Any) -> dict[str, float]:
    """States that are one number (step), which all parameters share."""
    for state in _inner(engine).state.values():
        return {key: float(x) for key, x in state.items() if torch.is_tensor(x) and not x.ndim}
    return {}


def _scaler(engine: Any) -> dict[str, float]:
    """Numbers of the fp16 loss scaler, where there is one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    values = vars(scaler).items() if hasattr(scaler, "__dict__") else ()
    return {key: value for key, value in values if isinstance(value, bool | int | float) and math.isfinite(value)}


def _link_states(engine: Any) -> None:
    """Lets parameters find their state: DeepSpeed 0.19 links all groups once, after the first group's first step."""
    if getattr(engine.optimizer, "_hp_optimizer_states_linked", False):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
