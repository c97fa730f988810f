"""LoRA: a backbone's matrices stay as they are, and low-rank products beside them are trained (Hu et al., ICLR 2022).

A matrix W computes W x + alpha / rank * B (A x); A is drawn, B starts at 0, so training starts from the backbone. Own
code and not peft, which wraps the network and renames its parameters: weights files, checkpoints, the plan of memory,
rates by layer and the read-out of facets all go by the names. Merged, the network is a backbone like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import ModelConfig

PARAMETERS = ".lora."  # in the names of what is trained
THIRDS = ("q", "k", "v")  # of the rows of a fused query-key-value matrix
FUSED, OUTPUT, MLP = "attn.qkv", "attn.proj", "mlp"


class LowRank(nn.Module):
    """alpha / rank * B (A x) for some parts of a matrix's rows, each with an A and a B of its own.

    The rows are divided into `of` equal parts, of which those numbered `parts` change; the others get 0.
    """

    def __init__(
        self, columns: int, rows: int, config: ModelConfig, parts: tuple[int, ...] = (0,), of: int = 1
    ) -> None:
        super().__init__()
        self.parts, self.of, self.rank = parts, of, config.lora_rank
        self.scale = config.lora_alpha / config.lora_rank
        self.a = nn.Parameter(torch.empty(len(parts) * self.rank, columns))
        self.b = nn.Parameter(torch.empty(len(parts), rows // of, self.rank))

    def reset_parameters(self) -> None:
        """A as torch draws a linear layer, B 0."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, x_NX: torch.Tensor) -> torch.Tensor:
        low = F.linear(x_NX.to(self.a.dtype), self.a).split(self.rank, dim=-1)
        found = {part: F.linear(low[i], self.b[i]) for i, part in enumerate(self.parts)}
        if self.of == 1:
            return self.scale * found[0]
        none = torch.zeros_like(found[self.parts[0]])
        return self.scale * torch.cat([found.get(part, none) for part in range(self.of)], dim=-1)


class LoraLinear(nn.Linear):
    """A linear layer whose weights are kept, in a type of their own perhaps, and a low-rank product beside it."""

    lora: LowRank

    @classmethod
    def around(cls, linear: nn.Linear, lora: LowRank) -> LoraLinear:
        """`linear`, whose parameters it takes over, with `lora`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias, made.lora = linear.weight, linear.bias, lora
        return made

    def forward(self, x_NX: torch.Tensor) -> torch.Tensor:
        kept = F.linear(x_NX.to(self.weight.dtype), self.weight, self.bias)
        return kept.to(x_NX.dtype) + self.lora(x_NX).to(x_NX.dtype)


def add_lora(backbone: Any, config: ModelConfig) -> None:
    """Puts low-rank products beside the matrices `lora_targets` of the last blocks, on the current default device.

    Raises ValueError for a matrix that the blocks have not, or not by a name that is known here.
    """
    for block in backbone.blocks[len(backbone.blocks) - config.finetune_last_n_blocks :]:
        chosen: dict[str, tuple[int, ...]] = {}  # by name within the block: the parts of its rows
        linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for target in config.lora_targets:
            names = _names(target, linear)
            if not names:
                raise ValueError(
                    f"model.lora_targets {target}: a block of {config.backbone} has no such matrix; it has "
                    f"{', '.join(linear) or 'none'}"
                )
            for name in names:
                part = (THIRDS.index(target),) if target in THIRDS and name == FUSED else ()
                chosen[name] = tuple(sorted({*chosen.get(name, ()), *part}))
        for name, parts in chosen.items():
            matrix = linear[name]
            of = len(THIRDS) if parts else 1
            lora = LowRank(matrix.in_features, matrix.out_features, config, parts or (0,), of)
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, LoraLinear.around(matrix, lora))


def _names(target: str, linear: Mapping[str, nn.Linear]) -> list[str]:
    """The matrices of a block that a target means."""
    if target in THIRDS:
        return [name for name in (FUSED, f"attn.{target}_proj") if name in linear]
    if target == "qkv":
        return [name for name in (FUSED, *(f"attn.{third}_proj" for third in THIRDS)) if name in linear]
    return [name for name in linear if name == OUTPUT] if target == "proj" else [n for n in linear if n.startswith(MLP)]


def in_frozen_precision(backbone: Any, name: str) -> bool:
    """Whether a parameter that is not trained has `model.frozen_precision`: of embeddings and frozen blocks.

    Of blocks with LoRA only the matrices have it that LoRA is beside; norms and all else compute with the activations.
    """
    if not name.startswith("blocks."):
        return not name.startswith("norm.")
    is_frozen = int(name.split(".")[1]) < backbone.num_frozen_blocks
    return is_frozen or isinstance(backbone.get_submodule(name.rpartition(".")[0]), LoraLinear)


def is_lora(name: str) -> bool:
    """Whether a key of a state dict is of a low-rank product."""
    return PARAMETERS in name


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds low-rank products to their matrices, in place: what is left is the plain network, of the same outputs.

    To the rounding of float32: 1e-5 of a descriptor's length. Matrices that were kept in 16 bits take the products'
    type, so nothing more is rounded.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            plain = nn.Linear(1, 1, bias=False)
            plain.in_features, plain.out_features, plain.bias = module.in_features, module.out_features, module.bias
            if plain.bias is not None:
                plain.bias.data = plain.bias.data.to(module.lora.a.dtype)
            lora = module.lora
            merged = _merged(module.weight, lora.a, lora.b, lora.parts, lora.scale)
            plain.weight = nn.Parameter(merged, requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)


def merged_weights(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """A network's state dict with low-rank products added to their matrices; one without LoRA as it is."""
    out = {name: tensor for name, tensor in weights.items() if not is_lora(name)}
    for name in weights:
        if name.endswith(f"{PARAMETERS}a"):
            matrix = name.removesuffix(f"{PARAMETERS}a")
            weight, a, b = out[f"{matrix}.weight"], weights[name], weights[f"{matrix}{PARAMETERS}b"]
            of = len(weight) // b.shape[1]
            parts = [0] if of == 1 else [part for part, third in enumerate(THIRDS) if third in config.lora_targets]
            out[f"{matrix}.weight"] = _merged(weight, a, b, parts, config.lora_alpha / config.lora_rank)
    return out


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, parts: Sequence[int], scale: float) -> torch.Tensor:
    """A copy of a matrix, in the products' type, with one product for each of the parts of its rows."""
    _, rows, rank = b.shape
    merged = weight.to(a.dtype, copy=True)
    for i, part in enumerate(parts):
        merged[part * rows : (part + 1) * rows] += scale * b[i] @ a[i * rank : (i + 1) * rank]
    return merged
