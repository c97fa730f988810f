"""torch.hub: `torch.hub.load("OWNER/REPOSITORY", "network", weights="net.safetensors")`, or `source="local"`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch

if TYPE_CHECKING:
    from trainer.published import PublishedNetwork

dependencies = [
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "yaml",
    "PIL",
    "torchcodec",
    "numpy",
]


def network(
    weights: str, *, resize: bool = True, device: str | None = None, plugins: tuple[str, ...] = (), **settings: Any
) -> PublishedNetwork:
    """A network: images [B, 3, H, W], uint8 or normalised floats, -> float32 L2-normalised descriptors [B, D].

    `weights` is whatever `rerankvpr.load` takes, or the address (https) of an exported file, which is downloaded once.
    With `resize`, images of any size are resized as in the training; without, their sides are multiples of the patch.
    """
    import rerankvpr

    rerankvpr.check_imports()
    from trainer.pretrained import load
    from trainer.published import PublishedNetwork

    if weights.startswith(("https://", "http://")):
        weights = _downloaded(weights)
    return PublishedNetwork(load(weights, device=device, plugins=plugins, **settings), resize=resize)


def _downloaded(address: str) -> str:
    """The file of an address in torch.hub's cache; a digest in its name (net-0123abcd.safetensors) is checked."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(address).path).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        match = torch.hub.HASH_REGEX.search(file.name)
        torch.hub.download_url_to_file(address, str(file), match[1] if match else None, progress=False)
    return str(file)
