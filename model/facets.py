"""Local features and saliency, read from the same forward pass as the global descriptor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

FACETS = ("query", "key", "value", "token")


@dataclass(frozen=True)
class ReadOut:
    """What one forward pass gives for re-ranking; N patches, class and register tokens left out."""

    descriptor_BD: torch.Tensor  # float32, L2-normalised
    local_BNC: torch.Tensor  # L2-normalised, heads concatenated
    saliency_BN: torch.Tensor  # CLS row of the attention logits q.k/sqrt(d), mean over heads


class FacetReader:
    """Collects one block's facet and another's CLS attention while it is attached to a ViT.

    Values, keys and queries are slices of the block's qkv product, so they cost nothing; of the N x N attention map
    only the CLS row is computed.
    """

    def __init__(self, vit: VisionTransformer, *, layer: int, facet: str, saliency_layer: int) -> None:
        if facet not in FACETS:
            raise ValueError(f"facet {facet!r} is not known; use one of {', '.join(FACETS)}")
        self.vit = vit
        self.layer = self._index(layer)
        self.facet = facet
        self.saliency_layer = self._index(saliency_layer)
        self.local_BNC: torch.Tensor
        self.saliency_BN: torch.Tensor

    def _index(self, layer: int) -> int:
        depth = len(self.vit.blocks)
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer}: the backbone has {depth} blocks; use {-depth} to {depth - 1}")
        return layer % depth

    def _take_local(self, tokens_BTC: torch.Tensor) -> None:
        patches_BNC = tokens_BTC[:, self.vit.num_prefix_tokens :]
        self.local_BNC = F.normalize(patches_BNC.float(), dim=-1)

    def _take_qkv(self, _module: object, _inputs: object, qkv_BTX: torch.Tensor) -> None:
        part = ("query", "key", "value").index(self.facet)
        self._take_local(qkv_BTX.chunk(3, dim=-1)[part])

    def _take_token(self, _module: object, _inputs: object, tokens_BTC: torch.Tensor) -> None:
        self._take_local(tokens_BTC)

    def _take_saliency(self, _module: object, _inputs: object, qkv_BTX: torch.Tensor) -> None:
        attn = self.vit.blocks[self.saliency_layer].attn
        q_BTC, k_BTC, _ = qkv_BTX.float().chunk(3, dim=-1)
        q_BHd = q_BTC[:, 0].unflatten(-1, (attn.num_heads, -1))
        k_BNHd = k_BTC[:, self.vit.num_prefix_tokens :].unflatten(-1, (attn.num_heads, -1))
        self.saliency_BN = torch.einsum("bhd,bnhd->bn", q_BHd, k_BNHd) * attn.scale / attn.num_heads

    @contextmanager
    def attached(self) -> Iterator[FacetReader]:
        """Hooks the blocks for the forward passes inside the `with`."""
        block = self.vit.blocks[self.layer]
        handles = [
            block.register_forward_hook(self._take_token)
            if self.facet == "token"
            else block.attn.qkv.register_forward_hook(self._take_qkv),
            self.vit.blocks[self.saliency_layer].attn.qkv.register_forward_hook(self._take_saliency),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
