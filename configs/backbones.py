"""Backbones and their sizes: one table that schema, FLOPs, memory plan, extraction, weights and exports ask.

It lies below the schema, which checks names and image sizes by it, and holds no code: `network` names the class that is
built from a spec (see `model.backbone`). A plug-in registers a spec of its own in `configs.registry.BACKBONES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from configs.image_size import height_width


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone, as numbers."""

    network: str | Any  # the class built from this spec, or "module:attribute" of it
    channels: int
    depth: int  # blocks
    heads: int
    patch: int  # side of a patch in pixels
    registers: int = 0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    hidden: int = 0  # outputs of an MLP's first layer, or of each of its two under SwiGLU; 0 is 4 x channels
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    layer_scale: float = 1e-5  # what layer scales start from, if not loaded
    table_side: int = 0  # side in pixels of the images that a learned position table is for; 0 if there is none
    published: str = ""  # repository of timm's weights on the Hugging Face hub
    licence: str = "Apache-2.0"  # of the published weights; `model.licences` has the texts that must travel with them

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", self.hidden or 4 * self.channels)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return 1 + self.registers

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return height // self.patch, width // self.patch

    def num_tokens(self, size: int | tuple[int, int]) -> int:
        """Tokens of an image of this side, or height and width."""
        rows, columns = self.grid(*height_width(size))
        return self.num_prefix_tokens + rows * columns

    def check_side(self, size: int | tuple[int, int], key: str) -> None:
        """Raises ValueError naming `key` and the nearest sides that patches cover, if they do not cover the image."""
        for side in height_width(size):
            if side < self.patch or side % self.patch:
                low = max(self.patch, side // self.patch * self.patch)
                raise ValueError(
                    f"{key}: {side} is not a multiple of the patch size {self.patch}; nearest: {low} or "
                    f"{low + self.patch}"
                )


def _dinov2(size: str, channels: int, depth: int, heads: int, **more: Any) -> BackboneSpec:
    spec = BackboneSpec("model.dinov2:DinoViT", channels, depth, heads, patch=14, table_side=518, **more)
    return replace(spec, published=f"timm/vit_{size}_patch14_dinov2.lvd142m")


def _with_registers(spec: BackboneSpec) -> BackboneSpec:
    return replace(spec, registers=4, published=spec.published.replace("_dinov2", "_reg4_dinov2"))


_DINOV2 = {
    "vits14": _dinov2("small", 384, 12, 6),
    "vitb14": _dinov2("base", 768, 12, 12),
    "vitl14": _dinov2("large", 1024, 24, 16),
    "vitg14": _dinov2("giant", 1536, 40, 24, mlp="swiglu", hidden=4096),
}


def _dinov3(size: str, channels: int, depth: int, heads: int, tag: str = "_qkvb", **more: Any) -> BackboneSpec:
    return BackboneSpec(
        "model.dinov3:DinoV3",
        channels,
        depth,
        heads,
        patch=16,
        registers=4,
        norm_eps=1e-5,
        published=f"timm/vit_{size}_patch16_dinov3{tag}.lvd1689m" if size else "",
        licence="DINOv3 License",
        **more,
    )


SPECS: Mapping[str, BackboneSpec] = {
    **_DINOV2,
    **{f"{name}_reg": _with_registers(spec) for name, spec in _DINOV2.items()},
    "tiny14": BackboneSpec("model.dinov2:DinoViT", 128, 4, 2, patch=14, table_side=84, layer_scale=1.0),
    "dinov3_vits16": _dinov3("small", 384, 12, 6),
    "dinov3_vits16plus": _dinov3("small_plus", 384, 12, 6, mlp="swiglu", hidden=1536),
    "dinov3_vitb16": _dinov3("base", 768, 12, 12),
    "dinov3_vitl16": _dinov3("large", 1024, 24, 16),
    "dinov3_vith16plus": _dinov3("huge_plus", 1280, 32, 20, mlp="swiglu", hidden=5120),
    "dinov3_vit7b16": _dinov3("7b", 4096, 40, 32, tag="", mlp="swiglu", hidden=8192, qkv_bias=False),
    "tiny16": replace(_dinov3("", 128, 4, 2, mlp="swiglu", hidden=344, layer_scale=1.0), licence="Apache-2.0"),
}
