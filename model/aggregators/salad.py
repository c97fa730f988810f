"""SALAD: patches shared out among clusters by optimal transport (Izquierdo and Civera, CVPR 2024).

Written from the paper's formulas. Its Sinkhorn runs in float32 whatever the network's precision is, and its dropout of
0.3 is left out: a descriptor would depend on the ranks and chunks that a batch is cut into.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from configs.backbones import BackboneSpec
from model.aggregators.aggregator import Aggregator, patches_of
from model.backbone import without_autocast


class Salad(Aggregator):
    """The patches of each cluster summed by their share in it, and a projection of the class token before them.

    `clusters` * `cluster_dim` + `token_dim` numbers: 64 * 128 + 256 = 8448. Clusters are normalised each by itself.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        clusters: int = 64,
        cluster_dim: int = 128,
        token_dim: int = 256,
        hidden: int = 512,
        iterations: int = 3,
    ) -> None:
        super().__init__()
        if min(clusters, cluster_dim, token_dim, hidden, iterations) < 1:
            raise ValueError("all arguments are 1 or more")
        self.output_size = clusters * cluster_dim + token_dim
        self.least_patches = clusters + 1  # the dustbin takes what is left of them
        self.iterations = iterations
        self.token = _perceptron(spec.channels, hidden, token_dim)
        self.feature = _perceptron(spec.channels, hidden, cluster_dim)
        self.score = _perceptron(spec.channels, hidden, clusters)
        self.dustbin = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        """The dustbin's score, 1."""
        nn.init.ones_(self.dustbin)

    def forward(self, tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        patches_BNC = patches_of(tokens_BTC, grid)
        feature_BNd, score_BNk = self.feature(patches_BNC), self.score(patches_BNC)
        token_Bt = self.token(tokens_BTC[:, 0])
        wide = torch.promote_types(score_BNk.dtype, torch.float32)
        with without_autocast(tokens_BTC):
            share_BNk = transport(score_BNk.to(wide), self.dustbin.to(wide), self.iterations)[..., :-1].exp()
            clusters_Bkd = F.normalize(share_BNk.transpose(1, 2) @ feature_BNd.to(wide), dim=-1)
            return torch.cat([F.normalize(token_Bt.to(wide), dim=-1), clusters_Bkd.flatten(1)], dim=-1)

    @classmethod
    def from_authors(cls, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Their 1 x 1 convolutions are linear; a dropout stands between their layers, so the second is number 3."""
        if "dust_bin" not in state:
            return dict(state)
        out = {"dustbin": state["dust_bin"].reshape(1)}
        for theirs, ours, second in (
            ("token_features", "token", 2),
            ("cluster_features", "feature", 3),
            ("score", "score", 3),
        ):
            for number, place in ((0, 0), (second, 2)):
                weight = state[f"{theirs}.{number}.weight"]
                out[f"{ours}.{place}.weight"] = weight.reshape(weight.shape[:2])
                out[f"{ours}.{place}.bias"] = state[f"{theirs}.{number}.bias"]
        return out


def transport(score_BNk: torch.Tensor, dustbin_1: torch.Tensor, iterations: int) -> torch.Tensor:
    """Logarithms [B, N, k + 1] of how N patches are shared out among k clusters and, last, the dustbin.

    Sinkhorn's scalings of exp(score), the dustbin's score being the same for all patches: a patch gives 1 in all, a
    cluster takes 1, the dustbin N - k; the last scaling is that of the patches (the paper's section 3.2).
    """
    batch, patches, clusters = score_BNk.shape
    score_BNK = torch.cat([score_BNk, dustbin_1.expand(batch, patches, 1)], dim=-1)
    taken_K = score_BNk.new_zeros(clusters + 1)
    taken_K[-1] = math.log(patches - clusters)
    given_BN1 = score_BNk.new_zeros(batch, patches, 1)
    for _ in range(iterations):
        scale_B1K = taken_K - (score_BNK + given_BN1).logsumexp(dim=1, keepdim=True)
        given_BN1 = -(score_BNK + scale_B1K).logsumexp(dim=2, keepdim=True)
    return score_BNK + scale_B1K + given_BN1


def _perceptron(channels: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))
