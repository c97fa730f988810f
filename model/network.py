"""The network: backbone, aggregator, L2-normalised global descriptor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from configs.backbones import BackboneSpec
from configs.registry import AGGREGATORS, BACKBONES
from configs.schema import ModelConfig
from model.aggregators.aggregator import Aggregator
from model.backbone import Backbone, build_backbone
from model.checked import check_descriptors, check_plugged, check_tokens
from model.finetune import choose_trained
from model.lora import add_lora
from model.materialise import materialise
from model.projection import Projection
from model.weights import (
    AGGREGATOR,
    BACKBONE,
    PROJECTION,
    backbone_weights,
    find_weights,
    head_weights,
    projection_weights,
    read_weights,
)


class PlaceModel(nn.Module):
    """A ViT whose global descriptor retrieves and whose facets re-rank."""

    def __init__(
        self,
        backbone: Backbone,
        aggregator: Aggregator,
        frozen_dtype: torch.dtype | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.projects = True  # off while it is fitted
        self.projection_loaded = False
        self.aggregator = aggregator
        self.frozen_dtype = frozen_dtype  # of the frozen blocks and embeddings; None is that of all else
        self.origins: tuple[str, ...] = ()  # modules that registered backbone and aggregator, of what is not built in

    @property
    def spec(self) -> BackboneSpec:
        """The backbone's numbers."""
        return self.backbone.spec

    @property
    def descriptor_size(self) -> int:
        """D, the length of the global descriptor."""
        return self.aggregator.output_size if self.projection is None else self.projection.output_size

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters that are not frozen."""
        return list(self.parameters())[-1].dtype

    @property
    def activation_checkpointing(self) -> bool:
        """Whether trained blocks are run again in the backward pass, instead of keeping what they computed."""
        return self.backbone.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.backbone.activation_checkpointing = on

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles each block's call in training mode, with torch.compile; evaluation, and its facets, stay eager."""
        self.backbone.compile_blocks(backend)

    def cast_frozen(self) -> None:
        """Puts the frozen part in `model.frozen_precision` again, after something has cast the whole network."""
        if self.frozen_dtype is not None:
            self.backbone.cast_frozen(self.frozen_dtype)

    @property
    def num_layers(self) -> int:
        """Layers that `layer_of` tells apart: the embeddings, each block, and the head."""
        return len(self.backbone.blocks) + 2

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter of `named_parameters`: 0 embeddings, then the blocks, last norm and aggregator."""
        room, _, name = parameter_name.partition(".")
        if room in ("aggregator", "projection") or name.startswith("norm."):
            return self.num_layers - 1
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Normalised float images -> float32 L2-normalised descriptors [B, D]; frozen blocks run without autograd."""
        grid, least = self.spec.grid(images_B3HW.shape[2], images_B3HW.shape[3]), self.aggregator.least_patches
        if grid[0] * grid[1] < least:
            raise ValueError(f"images of {grid[0]} x {grid[1]} patches; the aggregator needs {least} or more")
        tokens_BTC = self.backbone(images_B3HW, self.aggregator.insertion(), final_norm=self.aggregator.final_norm)
        images, least_tokens = images_B3HW.shape[0], self.spec.num_prefix_tokens + grid[0] * grid[1]
        check_tokens(self.backbone, tokens_BTC, images, least_tokens, self.spec.channels)
        descriptor_BD = self.aggregator(tokens_BTC, grid)
        check_descriptors(self.aggregator, descriptor_BD, images, self.aggregator.output_size)
        if self.projection is not None and self.projects:
            descriptor_BD = self.projection(F.normalize(descriptor_BD.float(), dim=-1))
        return F.normalize(descriptor_BD.float(), dim=-1)


def build_aggregator(config: ModelConfig) -> Aggregator:
    """The aggregator of a recipe, on the current default device.

    Raises ValueError for an argument that it does not take, or that does not fit the backbone.
    """
    try:
        built: Aggregator = AGGREGATORS.build(config.aggregator, config.aggregator_args, config.spec)
    except ValueError as error:
        raise ValueError(f"model.aggregator: {error}") from error
    return built


def meta_model(config: ModelConfig) -> PlaceModel:
    """The network of a recipe without memory (on the meta device), its trained part chosen.

    Raises ValueError where the choice does not fit the network.
    """
    frozen_dtype = torch.bfloat16 if config.frozen_precision == "bf16" else None
    with torch.device("meta"):
        aggregator = build_aggregator(config)
        projection = Projection(aggregator.output_size, config.projection_dim) if config.projection_dim else None
        model = PlaceModel(build_backbone(config.spec), aggregator, frozen_dtype, projection)
        if config.finetune == "lora":
            add_lora(model.backbone, config)
    model.origins = tuple(filter(None, (BACKBONES.origin(config.backbone), AGGREGATORS.origin(config.aggregator))))
    check_plugged(model, config)
    choose_trained(model.backbone, model.aggregator, config)
    model.cast_frozen()
    return model


def build_model(
    config: ModelConfig, *, seed: int = 0, partition: Callable[[nn.Module], None] | None = None
) -> PlaceModel:
    """The network of a recipe on the CPU, in float32, or what is frozen in `model.frozen_precision`.

    What is not loaded is drawn from `seed`, the same on all ranks. The network is built without memory and made one
    module at a time: `partition`, if given, is called with each module that has parameters of its own, once they hold
    their values, and may leave a partition of them (see `materialise`).
    Raises ValueError, WeightsError or FileNotFoundError before anything is made.
    """
    model = meta_model(config)
    weights: dict[str, torch.Tensor] = {}
    if file := find_weights(config.backbone, config.weights):
        state = read_weights(file)
        weights = {BACKBONE + key: tensor for key, tensor in backbone_weights(model.backbone, file, state).items()}
        weights |= {AGGREGATOR + key: tensor for key, tensor in head_weights(model.aggregator, file, state).items()}
        if model.projection is not None and (found := projection_weights(model.projection, state)):
            weights |= {PROJECTION + key: tensor for key, tensor in found.items()}
            model.projection_loaded = True
    materialise(model, weights, seed=seed, partition=partition)
    return model
