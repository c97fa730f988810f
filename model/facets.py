"""Local features and saliency, read from the same forward pass as the global descriptor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from model.backbone import Backbone

FACETS = ("attn", "query", "key", "value", "token")


class FacetReader:
    """Collects one block's facet and another's CLS attention while it is attached to a backbone.

    Values, keys and queries are those that the block's attention uses, which it computes anyway; of the N x N attention
    map only the CLS row is computed, except for facet `attn`: a patch's attention to all patches, mean over heads.
    `saliency` is the CLS row of the logits q.k/sqrt(d), or of their softmax over all tokens.
    """

    def __init__(
        self,
        vit: Backbone,
        *,
        layer: int,
        facet: str,
        saliency_layer: int,
        saliency: str = "logits",
        include_cls: bool = False,
    ) -> None:
        if facet not in FACETS:
            raise ValueError(f"facet {facet!r} is not known; use one of {', '.join(FACETS)}")
        if saliency not in ("logits", "softmax"):
            raise ValueError(f"saliency {saliency!r} is not known; use logits or softmax")
        if not vit.gives_qkv:
            raise ValueError(f"{type(vit).__name__} gives no q, k and v to re-rank by; use --eval.rerank.no-enabled")
        self.vit = vit
        self.layer = self._index(layer)
        self.facet = facet
        self.saliency_layer = self._index(saliency_layer)
        self.saliency = saliency
        self.include_cls = include_cls
        self.num_patches = 0
        self.local_BNC: torch.Tensor
        self.saliency_BN: torch.Tensor

    def _index(self, layer: int) -> int:
        depth = len(self.vit.blocks)
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer}: the backbone has {depth} blocks; use {-depth} to {depth - 1}")
        return layer % depth

    def _take_local(self, tokens_BTC: torch.Tensor) -> None:
        kept_BNC = tokens_BTC[:, -self.num_patches :]
        if self.include_cls:
            kept_BNC = torch.cat([tokens_BTC[:, :1], kept_BNC], dim=1)
        self.local_BNC = F.normalize(kept_BNC.float(), dim=-1)

    def _take_token(self, _module: object, _inputs: object, tokens_BTC: torch.Tensor) -> None:
        self._take_local(tokens_BTC)

    def _take_qkv(self, *qkv: torch.Tensor) -> None:
        self._take_local(qkv[("query", "key", "value").index(self.facet)])

    def _take_attn(self, q_BTC: torch.Tensor, k_BTC: torch.Tensor, _v: torch.Tensor) -> None:
        heads = self.vit.spec.heads
        q_BHTd, k_BHTd = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BTC, k_BTC))
        attn_BTT = (q_BHTd @ k_BHTd.transpose(-1, -2) * q_BHTd.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)
        self._take_local(attn_BTT[:, :, -self.num_patches :])

    def _take_saliency(self, q_BTC: torch.Tensor, k_BTC: torch.Tensor, _v: torch.Tensor) -> None:
        q_BHd = q_BTC[:, 0].float().unflatten(-1, (self.vit.spec.heads, -1))
        k_BTHd = k_BTC.float().unflatten(-1, (self.vit.spec.heads, -1))
        row_BHT = torch.einsum("bhd,bthd->bht", q_BHd, k_BTHd) * q_BHd.shape[-1] ** -0.5
        if self.saliency == "softmax":
            row_BHT = row_BHT.softmax(dim=-1)
        self.saliency_BN = row_BHT[:, :, -self.num_patches :].mean(dim=1)

    @contextmanager
    def attached(self, num_patches: int) -> Iterator[FacetReader]:
        """Hooks the blocks for the forward passes inside the `with`, of images of that many patches."""
        self.num_patches = num_patches
        if self.facet == "token":
            handles = [self.vit.blocks[self.layer].register_forward_hook(self._take_token)]
        else:
            handles = self.vit.watch(self.layer, self._take_attn if self.facet == "attn" else self._take_qkv)
        handles += self.vit.watch(self.saliency_layer, self._take_saliency)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def log_bin(local_BNC: torch.Tensor, grid: tuple[int, int], hierarchy: int) -> torch.Tensor:
    """Each patch with the averages of its surroundings appended, L2-normalised: [B, N, C * (1 + 8 * hierarchy)].

    Ring k < hierarchy holds the eight neighbours at 3^k patches, each averaged over 3^k x 3^k patches of the image;
    positions beyond the border are clamped to it (log-binning of dino-vit-features, by pooling and one gather).
    """
    rows, columns = grid
    map_BCHW = local_BNC.transpose(1, 2).unflatten(2, grid)
    y_N = torch.arange(rows, device=local_BNC.device).repeat_interleave(columns)
    x_N = torch.arange(columns, device=local_BNC.device).repeat(rows)
    bins = [local_BNC]
    for k in range(hierarchy):
        reach = 3**k
        mean_BNC = F.avg_pool2d(map_BCHW, reach, stride=1, padding=reach // 2, count_include_pad=False)
        mean_BNC = mean_BNC.flatten(2).transpose(1, 2)
        for dy in (-reach, 0, reach):
            for dx in (-reach, 0, reach):
                if dy or dx:
                    at_N = (y_N + dy).clamp(0, rows - 1) * columns + (x_N + dx).clamp(0, columns - 1)
                    bins.append(mean_BNC[:, at_N])
    return F.normalize(torch.cat(bins, dim=-1), dim=-1)
