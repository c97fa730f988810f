"""Bag of Queries: learned queries that ask the patches (Ali-bey, Chaib-draa and Giguere, CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from configs.backbones import BackboneSpec
from model.aggregators.aggregator import Aggregator, patches_of

HEAD = 64  # channels of an attention head


class BagOfQueries(Aggregator):
    """Encoder layers over the patches, each with queries that attend to its output; a linear map over all answers.

    `channels` * `rows` numbers: 384 * 32 = 12288. As published it reads the last block's tokens before the final norm.
    """

    final_norm: ClassVar[bool] = False

    def __init__(
        self, spec: BackboneSpec, channels: int = 384, queries: int = 64, layers: int = 2, rows: int = 32
    ) -> None:
        super().__init__()
        if min(channels, queries, layers, rows) < 1 or channels % HEAD:
            raise ValueError(f"channels is a multiple of {HEAD}, and queries, layers and rows are 1 or more")
        self.output_size = channels * rows
        self.reduce = nn.Conv2d(spec.channels, channels, kernel_size=3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(_Layer(channels, queries) for _ in range(layers))
        self.rows = nn.Linear(layers * queries, rows)

    def forward(self, tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        map_BCHW = patches_of(tokens_BTC, grid).transpose(1, 2).unflatten(2, grid)
        x_BNd = self.norm(self.reduce(map_BCHW).flatten(2).transpose(1, 2))
        answers = []
        for layer in self.layers:
            x_BNd, answer_Bqd = layer(x_BNd)
            answers.append(answer_Bqd)
        rows_Bdr: torch.Tensor = self.rows(torch.cat(answers, dim=1).transpose(1, 2))
        return rows_Bdr.flatten(1)

    @classmethod
    def from_authors(cls, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Their attention is torch's, with query, key and value in one matrix."""
        out = {}
        for name, tensor in state.items():
            key = name.replace("proj_c.", "reduce.").replace("norm_input.", "norm.").replace("boqs.", "layers.")
            key = f"rows.{key.removeprefix('fc.')}" if key.startswith("fc.") else key
            for theirs, ours in _PARTS:
                key = key.replace(theirs, ours)
            if ".in_proj_" in key:
                third = len(tensor) // 3
                out[key.replace("in_proj_", "query.")] = tensor[:third]
                out[key.replace("in_proj_", "key_value.")] = tensor[third:]
            else:
                out[key] = tensor
        return out


_PARTS = (
    ("encoder.self_attn.", "attend_patches."),
    ("encoder.linear1.", "widen."),
    ("encoder.linear2.", "narrow."),
    ("encoder.norm1.", "norm_attended."),
    ("encoder.norm2.", "norm_patches."),
    ("cross_attn.", "ask."),
    ("self_attn.", "attend_queries."),
    ("norm_q.", "norm_queries."),
    ("norm_out.", "norm_answers."),
    ("out_proj.", "out."),
)


class _Layer(nn.Module):
    """An encoder layer over the patches (norms after the sums, as torch's), then queries that attend to them."""

    def __init__(self, channels: int, queries: int) -> None:
        super().__init__()
        self.attend_patches = _Attention(channels)
        self.norm_attended = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.norm_patches = nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.empty(1, queries, channels))
        self.attend_queries = _Attention(channels)
        self.norm_queries = nn.LayerNorm(channels)
        self.ask = _Attention(channels)
        self.norm_answers = nn.LayerNorm(channels)

    def reset_parameters(self) -> None:
        """Queries drawn from a normal distribution of deviation 1."""
        nn.init.normal_(self.queries)

    def forward(self, x_BNd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches, encoded once more, and what the queries made of them [B, queries, channels]."""
        x_BNd = self.norm_attended(x_BNd + self.attend_patches(x_BNd, x_BNd))
        x_BNd = self.norm_patches(x_BNd + self.narrow(F.relu(self.widen(x_BNd))))
        queries_1qd = self.norm_queries(self.queries + self.attend_queries(self.queries, self.queries))
        return x_BNd, self.norm_answers(self.ask(queries_1qd.expand(x_BNd.shape[0], -1, -1), x_BNd))


class _Attention(nn.Module):
    """Attention of heads of 64 channels; its matrices are modules of their own, so that ZeRO-3 gathers each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, asking_BQd: torch.Tensor, asked_BNd: torch.Tensor) -> torch.Tensor:
        """What each of Q tokens takes from N."""
        key_BNd, value_BNd = self.key_value(asked_BNd).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (self.query(asking_BQd), key_BNd, value_BNd))
        answer_BHQd = F.scaled_dot_product_attention(q, k, v)
        answer_BQd: torch.Tensor = self.out(answer_BHQd.transpose(1, 2).flatten(2))
        return answer_BQd
