"""The network: backbone, aggregator, L2-normalised global descriptor."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from configs.schema import ModelConfig
from model.aggregators import AGGREGATORS
from model.backbone import AGGREGATOR, build_backbone, freeze_all_but_last, read_weights
from model.facets import FacetReader, ReadOut


class PlaceModel(nn.Module):
    """A ViT whose global descriptor retrieves and whose facets re-rank."""

    def __init__(self, backbone: VisionTransformer, aggregator: nn.Module, num_frozen_blocks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.aggregator = aggregator
        self.num_frozen_blocks = num_frozen_blocks

    @property
    def descriptor_size(self) -> int:
        """D, the length of the global descriptor."""
        return int(self.backbone.embed_dim)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.backbone.cls_token.device

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Normalised float images -> float32 L2-normalised descriptors [B, D]; frozen blocks run without autograd."""
        vit = self.backbone
        dtype = vit.patch_embed.proj.weight.dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_frozen_blocks == 0):
            x_BTC = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images_B3HW.to(dtype)))))
            for block in vit.blocks[: self.num_frozen_blocks]:
                x_BTC = block(x_BTC)
        for block in vit.blocks[self.num_frozen_blocks :]:
            x_BTC = block(x_BTC)
        x_BTC = vit.norm(x_BTC)
        descriptor_BD = self.aggregator(x_BTC[:, 0], x_BTC[:, vit.num_prefix_tokens :])
        return F.normalize(descriptor_BD.float(), dim=-1)

    def read_out(
        self, images_B3HW: torch.Tensor, *, layer: int = -2, facet: str = "value", saliency_layer: int = -1
    ) -> ReadOut:
        """Descriptors, local features and saliency of normalised float images from one forward pass."""
        reader = FacetReader(self.backbone, layer=layer, facet=facet, saliency_layer=saliency_layer)
        with reader.attached():
            descriptor_BD = self(images_B3HW)
        return ReadOut(descriptor_BD, reader.local_BNC, reader.saliency_BN)


def build_model(config: ModelConfig, *, seed: int = 0) -> PlaceModel:
    """The network of a recipe in float32; what is not loaded is initialised from `seed`, the same on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(config.backbone, config.weights)
        aggregator = AGGREGATORS[config.aggregator]()
    if config.weights not in ("timm", "random"):
        state = read_weights(Path(config.weights)).items()
        trained = {key.removeprefix(AGGREGATOR): value for key, value in state if key.startswith(AGGREGATOR)}
        if trained.keys() == aggregator.state_dict().keys():  # an exported model of the same aggregator
            aggregator.load_state_dict(trained)
    num_frozen = freeze_all_but_last(backbone, config.finetune_last_n_blocks)
    return PlaceModel(backbone, aggregator, num_frozen)
