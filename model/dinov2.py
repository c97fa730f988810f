"""DINOv2's vision transformer: timm's modules, facebookresearch's position table and keys."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.utils.hooks import RemovableHandle

from configs.backbones import BackboneSpec
from model.backbone import Backbone, State, TakeQkv, timm_arguments


class DinoViT(Backbone, VisionTransformer):
    """The ViT of a DINOv2 size, for images of any sides that are multiples of its patch."""

    pos_embed: torch.Tensor
    cls_token: torch.Tensor
    reg_token: torch.Tensor | None

    gives_qkv: ClassVar[bool] = True

    def __init__(self, spec: BackboneSpec) -> None:
        gated = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if spec.mlp == "swiglu" else {}
        first = 2 * spec.hidden if gated else spec.hidden
        super().__init__(
            **timm_arguments(spec, hidden=first),
            img_size=spec.table_side,
            reg_tokens=spec.registers,
            no_embed_class=bool(spec.registers),
            num_classes=0,
            dynamic_img_size=True,
            norm_layer=partial(LayerNorm, eps=spec.norm_eps),
            weight_init="skip",  # it is built without memory; `materialise` gives it values
            **gated,
        )
        self.spec = spec

    def reset_parameters(self) -> None:
        """Draws position table, class token and register tokens as DINOv2 does (its truncation is at 100 sigma)."""
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def embed(self, images_B3HW: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Class and register tokens before the patches, positions added; nothing to rotate by."""
        return self._pos_embed(self.patch_embed(images_B3HW)), None

    def watch(self, block: int, take: TakeQkv) -> list[RemovableHandle]:
        """q, k and v are slices of the product that attention makes, so they cost nothing."""

        def split(_module: object, _inputs: object, qkv_BTX: torch.Tensor) -> None:
            take(*qkv_BTX.chunk(3, dim=-1))

        return [self.blocks[block].attn.qkv.register_forward_hook(split)]

    def from_published(self, state: State) -> State:
        """From facebookresearch/dinov2's key layout (registers and SwiGLU included), or timm's.

        Raises ValueError for a file with registers where the model has none, or the other way round.
        """
        has_registers = "register_tokens" in state or "reg_token" in state
        if has_registers != bool(self.spec.registers):
            have, want = ("has", "without") if has_registers else ("has no", "with")
            raise ValueError(f"{have} register tokens; the model is one {want} them")
        state.setdefault("mask_token", torch.zeros(0))  # marks DINOv2's layout for timm's converter, which drops it
        converted: State = checkpoint_filter_fn(state, self)
        return converted

    @staticmethod
    def published_layout(state: State, spec: BackboneSpec) -> State:  # noqa: ARG004
        """`facebook_layout`."""
        return facebook_layout(state)

    def _pos_embed(self, patches_BHWC: torch.Tensor) -> torch.Tensor:
        """Class and register tokens before the patches, positions added.

        The table is resized as facebookresearch/dinov2's published models do: bicubic without antialiasing and with the
        scale (side + 0.1) / table side, or, for models with registers, to the size and antialiased.
        """
        batch, rows, columns, channels = patches_BHWC.shape
        table_1NC = self.pos_embed.float()
        first = 0 if self.no_embed_class else 1
        side = self.patch_embed.grid_size[0]
        if (rows, columns) != (side, side):
            map_1CHW = table_1NC[:, first:].reshape(1, side, side, channels).permute(0, 3, 1, 2)
            if self.reg_token is None:
                scale = ((rows + 0.1) / side, (columns + 0.1) / side)
                map_1CHW = F.interpolate(map_1CHW, scale_factor=scale, mode="bicubic")
            else:
                map_1CHW = F.interpolate(map_1CHW, size=(rows, columns), mode="bicubic", antialias=True)
            table_1NC = torch.cat([table_1NC[:, :first], map_1CHW.flatten(2).transpose(1, 2)], dim=1)
        table_1NC = table_1NC.to(patches_BHWC.dtype)
        patches_BNC = patches_BHWC.flatten(1, 2) + table_1NC[:, first:]
        cls_11C = self.cls_token + table_1NC[:, :first].sum(dim=1, keepdim=True)
        prefix = [cls_11C] if self.reg_token is None else [cls_11C, self.reg_token]
        return torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches_BNC], dim=1)


def facebook_layout(state: State) -> State:
    """A backbone's state dict in facebookresearch/dinov2's key layout, registers and SwiGLU included."""
    out = {}
    for key, value in state.items():
        block, _, _ = key.partition(".mlp.")
        gated = f"{block}.mlp.fc2.weight" in state and (
            state[f"{block}.mlp.fc1.weight"].shape[0] != state[f"{block}.mlp.fc2.weight"].shape[1]
        )
        out[key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if gated else key] = value
    if "reg_token" in out:  # timm has added the class token's position to it
        out["register_tokens"] = out.pop("reg_token")
        out["pos_embed"] = torch.cat([torch.zeros_like(out["cls_token"]), out["pos_embed"]], dim=1)
    out["mask_token"] = torch.zeros(1, out["cls_token"].shape[-1])
    return out
