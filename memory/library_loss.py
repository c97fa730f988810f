"""Losses that pytorch-metric-learning computes, its own or a plug-in's: over all ranks, exact, dense, without decay.

A loss must take a reference set. One that is ours too (MultiSimilarityLoss with a miner of the library) has our
defaults.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytorch_metric_learning.losses
import pytorch_metric_learning.miners
import torch
from pytorch_metric_learning.utils import loss_and_miner_utils

from configs.plugins import described
from configs.registry import LOSSES, MINERS, Registry
from configs.schema import LossConfig
from memory.pairing import GlobalBatch
from memory.probe import form_of


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
        arguments = _our_defaults(LOSSES, config.name) | config.args
        self.loss = _with_library(LOSSES, pytorch_metric_learning.losses).build(config.name, arguments)
        self.miner = None
        if config.miner != "none":
            miners = _with_library(MINERS, pytorch_metric_learning.miners)
            self.miner = miners.build(config.miner, _our_defaults(MINERS, config.miner) | config.miner_args)
        self.gradient_scale = gradient_scale
        if any(True for _ in self.loss.parameters()):
            raise ValueError(f"{config.name} has parameters of its own, which no optimizer here would train")
        try:
            ids = torch.tensor([0, 0, 1, 1])
            loss = self._compute(torch.eye(4, requires_grad=True), ids, torch.eye(4), ids, live=True)
        except Exception as error:  # whatever a loss raises, it does so before any training
            if LOSSES.origin(config.name) or MINERS.origin(config.miner):
                what = f"loss.name {config.name} with loss.miner {config.miner}"
                raise ValueError(f"{what}, on four descriptors and four references: {described(error)}") from error
            raise ValueError(f"{config.name} does not take a reference set, which the queue needs: {error}") from error
        if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
            raise ValueError(f"loss.name {config.name} gave {form_of(loss)}; expected one number with a gradient")

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
    """The library's classes and plug-ins', and our names, for what is nearest to one that is unknown."""
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    plugged = {name: ours[name] for name in ours if ours.origin(name)}
    return Registry(ours.kind, dict.fromkeys(ours, "") | classes | plugged, key=ours.key, more=ours.more)


def _our_defaults(ours: Registry[Any], name: str) -> dict[str, Any]:
    """The arguments that a loss or miner of ours has where a recipe gives none; the library's may be others."""
    if name not in ours or ours.origin(name) or not is_dataclass(ours[name]):
        return {}
    return {field.name: field.default for field in fields(ours[name]) if field.default is not MISSING}
