"""DINOv2 backbones through timm, and the weights that go into them."""

from __future__ import annotations

import pickle
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from configs.schema import PATCH

TIMM_NAMES = {
    "vits14": "vit_small_patch14_dinov2",
    "vitb14": "vit_base_patch14_dinov2",
    "vitl14": "vit_large_patch14_dinov2",
    "vitg14": "vit_giant_patch14_dinov2",
    "vits14_reg": "vit_small_patch14_reg4_dinov2",
    "vitb14_reg": "vit_base_patch14_reg4_dinov2",
    "vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "vitg14_reg": "vit_giant_patch14_reg4_dinov2",
}
NATIVE_SIDE = 518
TINY_SIDE = 84
AGGREGATOR = "aggregator."  # prefix of what is no backbone in an exported file


class WeightsError(ValueError):
    """A weights file that does not fit the model; the text names the keys that differ."""


def build_backbone(name: str, weights: str) -> VisionTransformer:
    """The ViT `name` of any input side that is a multiple of 14, with `weights`: "timm", "random" or a file.

    The position table keeps its pretrained grid and is interpolated in each forward pass (bicubic, antialiased), so one
    model serves all image sizes. Raises WeightsError or FileNotFoundError on a file that does not fit.
    """
    if name == "tiny14":
        if weights == "timm":
            raise WeightsError("model.weights timm: tiny14 has no published weights; use random or a file")
        vit = VisionTransformer(
            img_size=TINY_SIDE,
            patch_size=PATCH,
            embed_dim=128,
            depth=4,
            num_heads=2,
            init_values=1.0,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
        )
    else:
        vit = timm.create_model(
            TIMM_NAMES[name],
            pretrained=weights == "timm",
            img_size=NATIVE_SIDE,
            num_classes=0,
            dynamic_img_size=True,
        )
    if weights not in ("timm", "random"):
        load_backbone_weights(vit, Path(weights))
    return vit


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or `.pth` file, by key; nothing but tensors is ever unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise WeightsError(f"weights file {path} cannot be read: {_reason(error)}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights file {path} holds more than tensors, which is refused: save a state_dict"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"weights file {path} is not a state_dict: expected a flat mapping of keys to tensors")
    return state


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "the file is empty or cut off"


def load_backbone_weights(vit: VisionTransformer, path: Path) -> None:
    """Loads a file in facebookresearch/dinov2's key layout (registers and SwiGLU included), or in timm's."""
    state = {key: value for key, value in read_weights(path).items() if not key.startswith(AGGREGATOR)}
    has_registers = "register_tokens" in state or "reg_token" in state
    if has_registers != (vit.reg_token is not None):
        have, want = ("has", "without") if has_registers else ("has no", "with")
        raise WeightsError(f"weights file {path} {have} register tokens; the model is one {want} them")
    state.setdefault("mask_token", torch.zeros(0))  # marks DINOv2's layout for timm's converter, which drops it
    converted = checkpoint_filter_fn(state, vit)
    expected = vit.state_dict()
    missing = sorted(expected.keys() - converted.keys())
    unexpected = sorted(converted.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(converted[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in converted and converted[key].shape != expected[key].shape
    ]
    differences = [
        f"{len(keys)} {label}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if differences:
        raise WeightsError(f"weights file {path} does not fit the model; keys {'; '.join(differences)}")
    vit.load_state_dict(converted)


def facebook_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def infer_backbone(path: Path) -> str:
    """The backbone name that a weights file is for, from its width and its register tokens."""
    state = read_weights(path)
    width = state["cls_token"].shape[-1] if "cls_token" in state else 0
    sizes = {128: "tiny14", 384: "vits14", 768: "vitb14", 1024: "vitl14", 1536: "vitg14"}
    if width not in sizes:
        raise WeightsError(f"weights file {path} is no DINOv2 backbone: expected a cls_token of 384 to 1536 channels")
    return sizes[width] + ("_reg" if "register_tokens" in state or "reg_token" in state else "")


def freeze_all_but_last(vit: VisionTransformer, n: int) -> int:
    """Leaves the last `n` blocks and the final norm trainable and returns the number of frozen blocks.

    `n` equal to the depth trains the patch, position and class embeddings too; `n` 0 freezes all.
    """
    depth = len(vit.blocks)
    if n > depth:
        raise ValueError(f"model.finetune_last_n_blocks {n}: the backbone has {depth} blocks; use 0 to {depth}")
    if n < depth:
        vit.requires_grad_(False)
        vit.blocks[depth - n :].requires_grad_(True)
        vit.norm.requires_grad_(n > 0)
    return depth - n
