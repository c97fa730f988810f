"""What the network needs of a backbone, and what all share: blocks, of which frozen ones run without autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from configs.backbones import BackboneSpec
from model.lora import in_frozen_precision

State = dict[str, torch.Tensor]
TakeQkv = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class Insertion(NamedTuple):
    """Tokens of an aggregator's own that join the sequence."""

    block: int  # before which block
    module: nn.Module  # (tokens [B, T, C], tokens that stay before) -> tokens [B, T + n, C]


class Backbone(nn.Module):
    """A network of blocks over tokens: class token, `spec.registers` more, patches in row order.

    A subclass is built from its spec alone, makes `patch_embed`, `blocks` and `norm`, and says how images become
    tokens (`embed`). For re-ranking it also sets `gives_qkv` and has `watch`; for weights whose published keys differ
    from its own, `from_published` and `published_layout`. Modules with parameters of their own other than linear ones
    need `reset_parameters`.

    The first `num_frozen_blocks` blocks run without autograd, and the embeddings too unless it is 0; they may have
    another type than the rest, which activations are cast to between. In training, `activation_checkpointing` keeps
    only the input of each trained block for the backward pass.
    """

    spec: BackboneSpec
    patch_embed: Any
    blocks: Any  # a ModuleList
    norm: nn.Module

    gives_qkv: ClassVar[bool] = False
    num_frozen_blocks: int = 0
    activation_checkpointing: bool = False
    _compiled_blocks: tuple[Callable[..., torch.Tensor], ...] = ()

    def embed(self, images_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalised images -> the first block's tokens [B, T, C], and what blocks rotate patches by.

        That is sine beside cosine [patches, 2 * channels of a head], or None.
        """
        raise NotImplementedError

    def watch(self, block: int, take: TakeQkv) -> list[RemovableHandle]:
        """Calls `take` in each forward pass with q, k and v [B, T, C] as attention of a block uses them: rotated."""
        raise NotImplementedError

    def from_published(self, state: State) -> State:
        """What a published file holds, under this network's keys; the mapping may be changed."""
        return state

    @staticmethod
    def published_layout(state: State, spec: BackboneSpec) -> State:  # noqa: ARG004
        """This network's state dict under the keys that its weights are published with."""
        return state

    def forward(
        self, images_B3HW: torch.Tensor, insertion: Insertion | None = None, *, final_norm: bool = True
    ) -> torch.Tensor:
        """Normalised images -> tokens [B, T, C] after the final norm, or before it.

        Tokens that are inserted stand between the registers and the patches. If a frozen block is to carry their
        gradient, it and those after it run with autograd.
        """
        # Read from the parameter objects, whose type outlives their numbers under ZeRO-3 and costs no fetch.
        frozen, trained = (next(part.parameters()).dtype for part in (self.patch_embed, self.norm))
        blocks = self._compiled_blocks if self.training and self._compiled_blocks else tuple(self.blocks)
        with_graph = min(self.num_frozen_blocks, insertion.block) if insertion else self.num_frozen_blocks
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_frozen_blocks == 0):
            x_BTC, rotation = self.embed(images_B3HW.to(frozen))
        for number, block in enumerate(blocks):
            if number == self.num_frozen_blocks and frozen != trained:
                x_BTC = x_BTC.to(trained)
            if insertion and number == insertion.block:
                tokens = x_BTC.shape[1]
                x_BTC = insertion.module(x_BTC, self.spec.num_prefix_tokens)
                rotation = _unrotated(rotation, x_BTC.shape[1] - tokens)
            given = (x_BTC,) if rotation is None else (x_BTC, rotation)
            if number < with_graph:
                with torch.no_grad():
                    x_BTC = block(*given)
            elif self.activation_checkpointing and self.training and number >= self.num_frozen_blocks:
                x_BTC = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = block(*given)
        if self.num_frozen_blocks == len(blocks) and frozen != trained:
            x_BTC = x_BTC.to(trained)
        tokens_BTC: torch.Tensor = self.norm(x_BTC) if final_norm else x_BTC
        return tokens_BTC

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the blocks for training; in evaluation they run as they are, because hooks read facets from them."""
        self._compiled_blocks = tuple(torch.compile(block, backend=backend) for block in self.blocks)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Gives the frozen blocks and embeddings another type, also where ZeRO-3 has left a partition of them."""
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad and in_frozen_precision(self, name):
                parameter.data = parameter.data.to(dtype)
                if hasattr(parameter, "ds_tensor"):
                    parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)


def _unrotated(rotation_NX: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """A rotation with `count` rows before it that leave a token as it is: sine 0, cosine 1."""
    if rotation_NX is None:
        return None
    sine_nd, cosine_nd = (x_Nd[:1].expand(count, -1) for x_Nd in rotation_NX.chunk(2, dim=-1))
    still_nX = torch.cat([torch.zeros_like(sine_nd), torch.ones_like(cosine_nd)], dim=-1)
    return torch.cat([still_nX, rotation_NX])


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """A `with` in which products of float32 are of float32, also where an evaluation casts the others to 16 bits."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def timm_arguments(spec: BackboneSpec, hidden: int) -> dict[str, Any]:
    """What timm's networks call the sizes of a backbone whose MLPs have `hidden` channels."""
    return {
        "patch_size": spec.patch,
        "embed_dim": spec.channels,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "init_values": spec.layer_scale,
        "mlp_ratio": (hidden + 0.5) / spec.channels,  # timm rounds the product down
    }


def build_backbone(spec: BackboneSpec) -> Backbone:
    """The network that a spec names, on the current default device."""
    built: Backbone = network_of(spec)(spec)
    return built


def network_of(spec: BackboneSpec) -> type[Backbone]:
    """The class of a spec's network."""
    network = spec.network
    if isinstance(network, str):
        module, _, attribute = network.partition(":")
        network = getattr(importlib.import_module(module), attribute)
    found: type[Backbone] = network
    return found
