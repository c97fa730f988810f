"""A network for programs that are not ours: an nn.Module for torch.hub and the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from configs.schema import Recipe
from data_pipeline.images import normalise
from eval.describer import Describer
from eval.pixels import as_trained, input_size, interpolation_of, pixel_rule
from eval.weights_file import describer_of_file

CONFIG = "config.json"
LIBRARY = "rerankvpr"


class PublishedNetwork(nn.Module, PyTorchModelHubMixin, library_name=LIBRARY):
    """Images [B, 3, H, W] -> float32 L2-normalised descriptors [B, D], as the field's programs call a network.

    `from_pretrained(FOLDER_OR_REPOSITORY)` loads what `rerankvpr export CHECKPOINT FOLDER` wrote. With `resize`, images
    of any size are resized by the training's rule; without, their sides must be multiples of the patch.
    """

    def __init__(self, describer: Describer, *, resize: bool = True) -> None:
        super().__init__()
        self.network = describer.model
        self.config = describer.config
        self.resize = resize

    @property
    def descriptor_size(self) -> int:
        """D, the length of a descriptor."""
        return self.network.descriptor_size

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 RGB, or floats normalised with ImageNet's mean and deviation. Raises ValueError for other sides."""
        height, width = images_B3HW.shape[2:]
        patch = self.network.spec.patch
        if self.resize:
            sides = input_size(height, width, self.config, patch)
            if sides != (height, width):
                mode = InterpolationMode(interpolation_of(self.config))
                images_B3HW = TF.resize(images_B3HW, list(sides), interpolation=mode, antialias=True)
        elif height % patch or width % patch:
            raise ValueError(f"images are {height} x {width}; without resize, sides are multiples of {patch}")
        if not images_B3HW.is_floating_point():
            images_B3HW = normalise(images_B3HW)
        descriptors_BD: torch.Tensor = self.network(images_B3HW)
        return descriptors_BD

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", resize: bool = True, **options: Any
    ) -> PublishedNetwork:
        """The network of a folder or of a repository of the hub. Raises what reading it raises."""
        downloads = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        known = {key: options[key] for key in downloads if key in options}
        folder = Path(model_id)
        file = (
            folder / SAFETENSORS_SINGLE_FILE
            if folder.is_dir()
            else Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **known))
        )
        return cls(describer_of_file(file, device=torch.device(map_location)), resize=resize)

    def _save_pretrained(self, save_directory: Path) -> None:
        raise ValueError(f"{save_directory}: `rerankvpr export CHECKPOINT FOLDER` writes this folder, recipe included")


def config_of(recipe: Recipe, descriptor_size: int) -> str:
    """`config.json` of a folder for the hub: what the network is; the whole recipe is in the weights' metadata."""
    about = {
        "library": LIBRARY,
        "backbone": recipe.model.backbone,
        "aggregator": recipe.model.aggregator,
        "descriptor_size": descriptor_size,
        "image_size": recipe.eval.image_size,
        "pixels": pixel_rule(as_trained(recipe.eval, recipe.data)),
    }
    return json.dumps(about, indent=1) + "\n"


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what an export wrote, which another export may replace."""
    try:
        return bool(json.loads((folder / CONFIG).read_text()).get("library") == LIBRARY)
    except (OSError, ValueError, AttributeError):
        return False
