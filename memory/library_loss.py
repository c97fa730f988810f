"""Any loss of pytorch-metric-learning that takes a reference set, over all ranks: exact, dense and without decay."""

from __future__ import annotations

from typing import Any

import pytorch_metric_learning.losses
import pytorch_metric_learning.miners
import torch
from pytorch_metric_learning.utils import loss_and_miner_utils

from configs.registry import LOSSES, MINERS, Registry
from configs.schema import LossConfig
from memory.pairing import GlobalBatch


class LibraryLoss:
    """The loss of the whole global batch, computed on every rank, with the gradient of this rank's descriptors.

    References are the batch and the memory; an image is no pair with itself. Raises ValueError for a loss that takes no
    reference set or that has parameters of its own.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        gradient_scale: float,
    ) -> None:
        self.loss = _with_library(LOSSES, pytorch_metric_learning.losses).build(config.name, config.args)
        self.miner = None
        if config.miner != "none":
            miners = _with_library(MINERS, pytorch_metric_learning.miners)
            self.miner = miners.build(config.miner, config.miner_args)
        self.gradient_scale = gradient_scale
        if any(True for _ in self.loss.parameters()):
            raise ValueError(f"{config.name} has parameters of its own, which no optimizer here would train")
        try:
            self._compute(torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.eye(4), torch.tensor([0, 0, 1, 1]), live=True)
        except Exception as error:  # whatever a loss raises, it does so before any training
            raise ValueError(f"{config.name} does not take a reference set, which the queue needs: {error}") from error

    def __call__(
        self,
        batch: GlobalBatch,
        batch_ND: torch.Tensor,
        memory_MD: torch.Tensor,
        memory_ids_M: torch.Tensor,
        *,
        live: bool,
    ) -> torch.Tensor:
        """The loss; its value is the same on every rank. `batch_ND` is the gathered batch."""
        start, stop = batch.start, batch.start + len(batch.local_BD)
        batch_ND = torch.cat([batch_ND[:start], batch.local_BD, batch_ND[stop:]])
        loss = self._compute(batch_ND, batch.ids_N, memory_MD, memory_ids_M, live=live)
        loss = loss + (batch_ND * 0).sum()  # a loss of no pairs has no gradient; a non-finite descriptor makes it NaN
        return loss.detach() + self.gradient_scale * (loss - loss.detach())

    def _compute(
        self,
        batch_ND: torch.Tensor,
        batch_ids_N: torch.Tensor,
        memory_MD: torch.Tensor,
        memory_ids_M: torch.Tensor,
        *,
        live: bool,
    ) -> torch.Tensor:
        if live and not len(memory_MD):
            indices = self.miner(batch_ND, batch_ids_N) if self.miner else None
            plain: torch.Tensor = self.loss(batch_ND, batch_ids_N, indices)
            return plain
        references_RD = torch.cat([batch_ND if live else batch_ND.detach(), memory_MD])
        ids_R = torch.cat([batch_ids_N, memory_ids_M])
        if self.miner:
            indices = self.miner(batch_ND, batch_ids_N, references_RD, ids_R)
        else:
            indices = loss_and_miner_utils.get_all_pairs_indices(batch_ids_N, ids_R)
        own = torch.arange(len(batch_ND), device=batch_ND.device)
        indices = loss_and_miner_utils.remove_self_comparisons(indices, own, len(references_RD))
        loss: torch.Tensor = self.loss(batch_ND, batch_ids_N, indices, references_RD, ids_R)
        return loss


def _with_library(ours: Registry[Any], module: Any) -> Registry[Any]:
    """The library's classes, and our names, for what is nearest to one that is unknown."""
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return Registry(ours.kind, dict.fromkeys(ours, "") | classes, key=ours.key, more=ours.more)
