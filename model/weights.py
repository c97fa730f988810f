"""Weights of DINOv2 backbones: files in, in whichever layout, and out again in facebookresearch's."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn

from configs.reading import reading
from configs.registry import BACKBONES
from model.dinov2 import DinoViT

AGGREGATOR = "aggregator."  # prefix of what is no backbone in an exported file


class WeightsError(ValueError):
    """A weights file that does not fit the model; the text names the keys that differ."""


def find_weights(name: str, weights: str) -> Path | None:
    """The file that `model.weights` means for the backbone `name`: None for "random".

    "timm" is the file that timm publishes on the Hugging Face hub, downloaded once into the hub's cache.
    """
    if weights == "random":
        return None
    if weights != "timm":
        return Path(weights)
    repository = BACKBONES.get(name).published
    if not repository:
        raise WeightsError(f"model.weights timm: {name} has no published weights; use random or a file")
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except OSError as error:
        raise WeightsError(
            f"model.weights timm: {repository} cannot be downloaded ({_reason(error)}); give a file instead"
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or `.pth` file, by key; nothing but tensors is ever unpickled.

    Numbers stay in the file, mapped into memory, until they are used (a `.pth` of torch before 1.6 is read whole).
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    with reading(f"weights file {path}", "a file of tensors that can be read", WeightsError):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"weights file {path} holds more than tensors, which is refused: save a state_dict"
            ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"weights file {path} is not a state_dict: expected a flat mapping of keys to tensors")
    return state


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "the file is empty or cut off"


def backbone_weights(vit: DinoViT, path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of file `path` under the keys of `vit`, which may be on the meta device.

    `state`, what the file holds, has facebookresearch/dinov2's key layout (registers and SwiGLU included), or timm's.
    """
    state = {key: value for key, value in state.items() if not key.startswith(AGGREGATOR)}
    has_registers = "register_tokens" in state or "reg_token" in state
    if has_registers != (vit.reg_token is not None):
        have, want = ("has", "without") if has_registers else ("has no", "with")
        raise WeightsError(f"weights file {path} {have} register tokens; the model is one {want} them")
    state.setdefault("mask_token", torch.zeros(0))  # marks DINOv2's layout for timm's converter, which drops it
    with reading(f"weights file {path}", "weights of a DINOv2 backbone", WeightsError):
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
    return {key: converted[key] for key in expected}


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
    width = state["cls_token"].shape[-1] if "cls_token" in state and state["cls_token"].ndim else 0
    registers = "register_tokens" in state or "reg_token" in state
    for name, spec in BACKBONES.items():
        if spec.channels == width and bool(spec.registers) == registers:
            return name
    raise WeightsError(f"weights file {path} is no DINOv2 backbone: expected a cls_token of 384 to 1536 channels")
