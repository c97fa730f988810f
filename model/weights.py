"""Weights of backbones and aggregators: files in, in whichever layout."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from configs.reading import reading, shown
from configs.registry import BACKBONES
from model.aggregators.aggregator import Aggregator
from model.backbone import Backbone
from model.lora import is_lora
from model.projection import Projection
from model.wrapped_weights import AGGREGATOR, told, unwrapped

# Prefixes in a state dict of the network, as `AGGREGATOR` is.
BACKBONE, PROJECTION = "backbone.", "projection."
REGISTERS = ("register_tokens", "storage_tokens", "reg_token")  # what files call them


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

    Those of a backbone inside another program's checkpoint have its own keys; see `unwrapped`.
    """
    content = read_tensors(path)
    try:
        return unwrapped(content)
    except ValueError as error:
        raise WeightsError(f"weights file {path} is not a state_dict: {error}") from error


def read_tensors(path: Path) -> Any:
    """What a `.safetensors` or `.pth` file holds, under its own keys.

    Numbers stay in the file, mapped into memory, until they are used (a `.pth` of torch before 1.6 is read whole).
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    with reading(f"weights file {path}", "a file of tensors that can be read", WeightsError):
        content: Any
        try:
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"weights file {path} holds more than tensors, which is refused: save a state_dict"
            ) from error
    return content


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "the file is empty or cut off"


def backbone_weights(backbone: Backbone, path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of file `path` under the keys of `backbone`, which may be on the meta device.

    `state`, what the file holds, has the keys that the backbone's weights are published with, or timm's; its keys may
    stand within those of a whole network.
    """
    with reading(f"weights file {path}", "weights of such a backbone", WeightsError):
        try:
            converted = backbone.from_published(_backbone_part(state))
        except ValueError as error:
            raise WeightsError(f"weights file {path} {error}") from error
    own = {key: tensor for key, tensor in backbone.state_dict().items() if not is_lora(key)}
    return _fitting(converted, own, path)


def head_weights(aggregator: Aggregator, path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of file `path` under the keys of `aggregator`; none if the file holds another one's, or none.

    Raises WeightsError for the same aggregator with other arguments.
    """
    head = {key.removeprefix(AGGREGATOR): tensor for key, tensor in state.items() if key.startswith(AGGREGATOR)}
    own = aggregator.state_dict()
    with reading(f"weights file {path}", "weights of such an aggregator", WeightsError):
        head = aggregator.from_authors(head)
    return _fitting(head, own, path) if head.keys() == own.keys() else {}


def projection_weights(projection: Projection, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projection in what a file holds, if it is of these sizes; none else."""
    own = projection.state_dict()
    found = {key: state[PROJECTION + key] for key in own if PROJECTION + key in state}
    return found if {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in own.items()} else {}


def _backbone_part(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a file is the backbone's, under the backbone's own keys."""
    return {key: tensor for key, tensor in unwrapped(state).items() if not key.startswith((AGGREGATOR, PROJECTION))}


def _fitting(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """`found` in the order of `expected`. Raises WeightsError naming the keys that differ."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    differences = [
        f"{len(keys)} {label}: {', '.join(map(shown, keys[:4]))}{', ...' if len(keys) > 4 else ''}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if differences:
        raise WeightsError(f"weights file {path} does not fit the model; keys {'; '.join(differences)}")
    return {key: found[key] for key in expected}


def infer_backbone(path: Path) -> str:
    """The backbone name that a weights file is for, from width, patch, registers and kind of MLP."""
    state = _backbone_part(read_weights(path))
    cls_token, patches = state.get("cls_token"), state.get("patch_embed.proj.weight")
    if cls_token is not None and patches is not None and cls_token.ndim and patches.ndim == 4:
        depth = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)), default=-1)
        found = {
            "channels": cls_token.shape[-1],
            "depth": depth,
            "patch": patches.shape[-1],
            "registers": next((state[key].shape[1] for key in REGISTERS if key in state and state[key].ndim > 1), 0),
            "mlp": "swiglu" if _is_gated(state) else "gelu",
        }
        for name, spec in BACKBONES.items():
            if all(getattr(spec, field) == value for field, value in found.items()):
                return name
    raise WeightsError(f"weights file {path} fits no backbone; known: {', '.join(BACKBONES)}; {told(state)}")


def _is_gated(state: dict[str, torch.Tensor]) -> bool:
    """Whether MLPs have a gate: layers of their own, or one of twice the width."""
    first, second = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    packed = first is not None and second is not None and first.shape[:1] != second.shape[1:]
    return packed or any(key.startswith(("blocks.0.mlp.w1", "blocks.0.mlp.fc1_")) for key in state)
