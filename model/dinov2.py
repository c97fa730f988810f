"""DINOv2's vision transformer: timm's modules, facebookresearch's position table, frozen blocks without autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.backbones import BackboneSpec


class DinoViT(VisionTransformer):
    """The ViT of a DINOv2 size, for images of any sides that are multiples of its patch.

    `forward` gives all tokens after the final norm. The first `num_frozen_blocks` blocks run without autograd, and the
    embeddings too unless it is 0; they may have another type than the rest, which activations are cast to between.
    In training, `activation_checkpointing` keeps only the input of each trained block for the backward pass.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        gated = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if spec.mlp == "swiglu" else {}
        first = 2 * spec.hidden if gated else spec.hidden
        super().__init__(
            img_size=spec.table_side,
            patch_size=spec.patch,
            embed_dim=spec.channels,
            depth=spec.depth,
            num_heads=spec.heads,
            init_values=spec.layer_scale,
            reg_tokens=spec.registers,
            no_embed_class=bool(spec.registers),
            num_classes=0,
            dynamic_img_size=True,
            mlp_ratio=(first + 0.5) / spec.channels,  # timm rounds the product down
            **gated,
        )
        self.spec = spec
        self.num_frozen_blocks = 0
        self.activation_checkpointing = False
        self._compiled_blocks: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def reset_parameters(self) -> None:
        """Draws position table, class token and register tokens as DINOv2 does (its truncation is at 100 sigma)."""
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Normalised images -> tokens [B, T, C]: class token, register tokens, patches in row order."""
        # Read from the parameter objects, whose type outlives their numbers under ZeRO-3 and costs no fetch.
        frozen, trained = (next(part.parameters()).dtype for part in (self.patch_embed, self.norm))
        blocks = self._compiled_blocks if self.training and self._compiled_blocks else list(self.blocks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_frozen_blocks == 0):
            x_BTC = self._pos_embed(self.patch_embed(images_B3HW.to(frozen)))
            for block in blocks[: self.num_frozen_blocks]:
                x_BTC = block(x_BTC)
        if frozen != trained:
            x_BTC = x_BTC.to(trained)
        for block in blocks[self.num_frozen_blocks :]:
            if self.activation_checkpointing and self.training:
                x_BTC = checkpoint(block, x_BTC, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = block(x_BTC)
        tokens_BTC: torch.Tensor = self.norm(x_BTC)
        return tokens_BTC

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the blocks for training; in evaluation they run as they are, because hooks read facets from them."""
        self._compiled_blocks = [torch.compile(block, backend=backend) for block in self.blocks]

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Gives the frozen blocks and embeddings another type, also where ZeRO-3 has left a partition of them."""
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad and not name.startswith("norm."):
                parameter.data = parameter.data.to(dtype)
                if hasattr(parameter, "ds_tensor"):
                    parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)

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
