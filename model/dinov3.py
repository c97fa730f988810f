"""DINOv3's vision transformer: timm's Eva, with facebookresearch's keys."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import nn
from torch.utils.hooks import RemovableHandle

from configs.backbones import BackboneSpec
from model.backbone import Backbone, State, TakeQkv, timm_arguments

BASE = 100.0  # of the rotation's periods


class DinoV3(Backbone, Eva):
    """The ViT of a DINOv3 size: no position table, but queries and keys of patches rotated by their place (RoPE).

    Places count from -1 to 1 on each side, at any size. The random scaling of the published code's training is left
    out, as in timm: a place is the same in every forward pass.
    """

    cls_token: torch.Tensor
    reg_token: torch.Tensor
    rope: Any  # timm ships no types

    gives_qkv: ClassVar[bool] = True

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__(
            **timm_arguments(spec, hidden=spec.hidden),
            img_size=224,  # of no consequence: the size is that of each image
            num_reg_tokens=spec.registers,
            qkv_bias=spec.qkv_bias,
            swiglu_mlp=spec.mlp == "swiglu",
            swiglu_align_to=1,  # its two layers apart, as they are published
            norm_layer=partial(LayerNorm, eps=spec.norm_eps),
            global_pool="token",
            use_fc_norm=False,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=BASE,
            rope_rotate_half=True,
            num_classes=0,
            dynamic_img_size=True,
        )
        self.spec = spec
        for block in self.blocks:
            block.attn.qkv_bias_separate = True  # the product is made by calling its module, which ZeRO-3 gathers
        self._rotation: tuple[Any, torch.Tensor] | None = None

    def reset_parameters(self) -> None:
        """Draws class token and registers as DINOv3 does."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)

    def embed(self, images_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and register tokens before the patches, and the patches' rotation."""
        patches_BHWC = self.patch_embed(images_B3HW)
        batch, rows, columns, _ = patches_BHWC.shape
        prefix = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        x_BTC = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches_BHWC.flatten(1, 2)], dim=1)
        return x_BTC, self._rotation_of(rows, columns)

    def _rotation_of(self, rows: int, columns: int) -> torch.Tensor:
        """Sine beside cosine of each patch [rows * columns, 2 * channels of a head], made once for images of a size."""
        key = rows, columns, self.rope.periods.device
        if self._rotation is None or self._rotation[0] != key:
            with torch.inference_mode(False):  # a training may use what an evaluation made
                self._rotation = key, self.rope.get_embed(shape=[rows, columns])
        return self._rotation[1]

    def watch(self, block: int, take: TakeQkv) -> list[RemovableHandle]:
        """q, k and v are made again from attention's product: biases added, q and k rotated."""
        attn = self.blocks[block].attn
        rotation: list[torch.Tensor] = []

        def note(_module: object, _inputs: object, named: dict[str, torch.Tensor]) -> None:
            rotation[:] = [named["rope"]]

        def split(_module: object, _inputs: object, qkv_BTX: torch.Tensor) -> None:
            if attn.q_bias is not None:
                qkv_BTX = qkv_BTX + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q_BTC, k_BTC, v_BTC = qkv_BTX.chunk(3, dim=-1)
            take(self._rotated(q_BTC, rotation[0]), self._rotated(k_BTC, rotation[0]), v_BTC)

        return [
            attn.register_forward_pre_hook(note, with_kwargs=True),
            attn.qkv.register_forward_hook(split),
        ]

    def _rotated(self, x_BTC: torch.Tensor, rotation_NX: torch.Tensor) -> torch.Tensor:
        """Queries or keys as attention uses them; tokens before the patches stay."""
        still = self.spec.num_prefix_tokens
        x_BHTd = x_BTC.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2)
        turned_BHNd = apply_rot_embed_cat(x_BHTd[:, :, still:], rotation_NX, half=True)
        return torch.cat([x_BHTd[:, :, :still], turned_BHNd], dim=2).transpose(1, 2).flatten(2)

    def from_published(self, state: State) -> State:
        """From facebookresearch/dinov3's key layout, or timm's; a file without biases of q and v has them 0.

        Raises ValueError for a file without registers.
        """
        if "storage_tokens" not in state and "reg_token" not in state:
            raise ValueError("has no register tokens; the model is one with them")
        if not self.spec.qkv_bias:
            state = {key: value for key, value in state.items() if not key.endswith("attn.qkv.bias")}
        converted: State = checkpoint_filter_fn(state, self)
        if self.spec.qkv_bias:
            for number in range(self.spec.depth):
                for name in ("q_bias", "v_bias"):
                    converted.setdefault(f"blocks.{number}.attn.{name}", torch.zeros(self.spec.channels))
        return converted

    @staticmethod
    def published_layout(state: State, spec: BackboneSpec) -> State:
        """Under facebookresearch/dinov3's keys, which timm reads too: the key's bias is 0 and masked."""
        out: State = {}
        for key, value in state.items():
            name = key
            for ours, theirs in _NAMES + (_GATED if spec.mlp == "swiglu" else ()):
                name = name.replace(ours, theirs)
            if key.endswith("attn.v_bias"):
                continue
            if key.endswith("attn.q_bias"):
                name = name.replace("q_bias", "qkv.bias")
                ones = torch.ones_like(value)
                out[f"{name}_mask"] = torch.cat([ones, torch.zeros_like(value), ones])
                value = torch.cat([value, torch.zeros_like(value), state[key.replace("q_bias", "v_bias")]])
            out[name] = value
        quarter = spec.channels // spec.heads // 4
        out["rope_embed.periods"] = BASE ** (torch.arange(quarter) / quarter)
        out["mask_token"] = torch.zeros(1, spec.channels)
        return out


_NAMES = (
    ("reg_token", "storage_tokens"),
    ("gamma_1", "ls1.gamma"),
    ("gamma_2", "ls2.gamma"),
)
_GATED = (("mlp.fc1_g.", "mlp.w1."), ("mlp.fc1_x.", "mlp.w2."), ("mlp.fc2.", "mlp.w3."))
