"""Parameters of a network built on the meta device, made one module at a time: loaded, or drawn from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def materialise(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    seed: int = 0,
    partition: Callable[[nn.Module], None] | None = None,
) -> None:
    """Gives every parameter and buffer of `model` memory on the CPU and its value: of `weights`, else drawn.

    Modules are visited in one order on all ranks, a module after all below it. `partition` is called with each that has
    parameters of its own, as soon as these hold their values, and may take them away (a partition of them under
    ZeRO-3); so no more than one module's own parameters are whole in memory, beside pages of the weights file.

    What is drawn depends on `seed` and the module's name alone: linear weights normal with deviation 0.02 (DINOv2 and
    timm cut that off at 100 deviations), their biases 0, all else by the module's `reset_parameters`.
    """
    for name, module in reversed(list(model.named_modules())):
        own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if not own:
            continue
        module.to_empty(device="cpu", recurse=False)
        missing = [key for key in own if f"{name}.{key}".lstrip(".") not in weights]
        if missing:
            _draw(module, seed, name)
        with torch.no_grad():
            for key in own:
                if key not in missing:
                    getattr(module, key).copy_(weights[f"{name}.{key}".lstrip(".")])
        if partition:
            partition(module)


def _draw(module: Any, seed: int, name: str) -> None:
    """Initial values of a module's own parameters; the global generator is left as it was."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            module.reset_parameters()
