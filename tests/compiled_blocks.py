"""Tiny networks with gradients to compare, and what `torch.compile` of their blocks may not change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.schema import ModelConfig, RerankConfig
from eval.local_features import read_local
from model.network import PlaceModel, build_model


def tiny(**changes: Any) -> PlaceModel:
    fields = {"backbone": "tiny14", "weights": "random", "aggregator": "gem", "finetune_last_n_blocks": 2}
    return build_model(ModelConfig.model_validate(fields | changes), seed=1)


def images(n: int = 3, side: int = 28) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: PlaceModel, n: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is not symmetric in the images, and its gradients by name."""
    model.zero_grad()
    descriptor_BD = model(images(n))
    loss = (descriptor_BD @ descriptor_BD.T * torch.arange(n * n).view(n, n)).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_compiled_blocks(backend: str) -> None:
    """Compiled with this backend, blocks train to the same gradients but for rounding, and evaluation stays eager."""
    model = tiny(finetune_last_n_blocks=3).eval()
    with torch.inference_mode():
        before = read_local(model, images(), RerankConfig(layer=-1, saliency_layer=0))
    model.train()
    plain = loss_and_gradients(model)
    ran: list[nn.Module] = []
    model.compile_blocks(backend)
    keys = list(model.state_dict())
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        loss, gradients = loss_and_gradients(model)
        torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-5)
        assert gradients.keys() == plain[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == keys == list(tiny().state_dict())
    handle = model.backbone.blocks[1].attn.qkv.register_forward_hook(lambda module, *_: ran.append(module))
    model.eval()
    with torch.inference_mode():
        after = read_local(model, images(), RerankConfig(layer=-1, saliency_layer=0))
    handle.remove()
    assert ran == [model.backbone.blocks[1].attn.qkv]
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
