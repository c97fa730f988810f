"""The optimizer's state by parameter name: one set of files for any world size and ZeRO stage, and no pickle.

DeepSpeed's own checkpoints hold flat partitions, which resume at the world size and stage that wrote them alone. Here
each trained parameter's fp32 master weight and moments are put together one at a time, whole, and handed back to
whatever partitions the resuming engine has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

FILE_BYTES = 1 << 30


def save_optimizer(engine: Any, folder: Path) -> None:
    """Writes `optimizer-<i>.safetensors` and `optimizer.json` into `folder` from rank 0. Every rank must call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_states(engine)
    keys, main = _state_keys(engine), dist.get_rank() == 0
    waiting: dict[str, torch.Tensor] = {}
    files = 0

    def write() -> None:
        nonlocal files, waiting
        if waiting:
            save_file(waiting, folder / f"optimizer-{files:05d}.safetensors")
            files, waiting = files + 1, {}

    for name, parameter in _trained(engine):
        whole = {key: safe_get_full_optimizer_state(parameter, key) for key in keys} if _is_zero(engine) else {}
        if not _is_zero(engine):
            whole = {key: engine.optimizer.state[parameter][key] for key in keys}
        if parameter.dtype != torch.float32:
            whole["master"] = safe_get_full_fp32_param(parameter)
        if main:
            waiting |= {f"{name}:{key}": tensor.detach().cpu().contiguous() for key, tensor in whole.items()}
            if sum(tensor.nbytes for tensor in waiting.values()) > FILE_BYTES:
                write()
    if main:
        write()
        (folder / "optimizer.json").write_text(json.dumps({"counts": _counts(engine), "scaler": _scaler(engine)}))


def load_optimizer(engine: Any, folder: Path, weights: dict[str, torch.Tensor], forward: Callable[[], Any]) -> None:
    """Puts `weights` (the model's state dict) and the saved optimizer state into an engine of any layout.

    `forward` runs the network on anything and returns a tensor of it: a step at rate 0 lets the engine lay out its
    state. Every rank must call this.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(forward().float().sum() * 0)
        engine.step()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _link_states(engine)

    engine.module.load_state_dict(weights)
    saved = dict(_saved_tensors(folder))
    described = json.loads((folder / "optimizer.json").read_text())
    stepped = any(not name.endswith(":master") for name in saved)  # else it was saved before any update: moments are 0
    for name, parameter in _trained(engine):
        if _is_zero(engine):
            master = saved[f"{name}:master"]() if f"{name}:master" in saved else weights[name]
            safe_set_full_fp32_param(parameter, master.to(parameter.device, torch.float32))
        for key in _state_keys(engine) if stepped else ():
            if f"{name}:{key}" not in saved:
                raise ValueError(f"{folder} has no {key} of {name}; it was written by another optimizer")
            tensor = saved[f"{name}:{key}"]().to(parameter.device)
            if _is_zero(engine):
                safe_set_full_optimizer_state(parameter, tensor, key)
            else:
                engine.optimizer.state[parameter][key].copy_(tensor)
    for state in _inner(engine).state.values():
        for key in [key for key, x in state.items() if torch.is_tensor(x) and not x.ndim]:
            state[key].fill_(described["counts"].get(key, 0.0))
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for key, value in described["scaler"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _is_zero(engine: Any) -> bool:
    """Whether DeepSpeed wraps the optimizer; at stage 0 in fp32 it is torch's own, on the parameters themselves."""
    return hasattr(engine.optimizer, "optimizer")


def _inner(engine: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = engine.optimizer.optimizer if _is_zero(engine) else engine.optimizer
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


def _saved_tensors(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Each saved tensor's name, and how to read it."""
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, lambda file=file, name=name: file.get_tensor(name)  # type: ignore[misc]
