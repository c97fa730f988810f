"""One loss over all ranks: the global batch against itself and the memory queue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.schema import LossConfig, MemoryConfig
from memory.gather import all_gather, all_gather_with_grad
from memory.losses import mine_multi_similarity, multi_similarity_loss
from memory.queue import MemoryQueue


@dataclass(frozen=True)
class GlobalLossOutput:
    """A step's loss and what the queue stores of it."""

    loss: torch.Tensor  # mean over this rank's anchors; its mean over ranks is the global loss
    descriptors_ND: torch.Tensor  # the global batch, detached
    place_ids_N: torch.Tensor
    stats: dict[str, torch.Tensor]  # over this rank's anchors; means over ranks are the global figures


def global_loss(
    local_BD: torch.Tensor,
    place_ids_B: torch.Tensor,
    queue: MemoryQueue,
    *,
    step: int,
    loss: LossConfig,
    memory: MemoryConfig,
) -> GlobalLossOutput:
    """Multi-Similarity loss of this rank's anchors against the batch of all ranks and the queue, in float32.

    local_BD are L2-normalised descriptors, as many on every rank. References of the batch carry gradient on both sides
    of a pair, also across ranks; memory entries carry none, and their negatives are weighted by
    exp(-decay_lambda * age), age in optimizer steps. Averaging the parameter gradients over ranks, as data-parallel
    engines do, gives the gradient of one process that holds the whole batch (computed in float64 when given so).
    """
    compute = torch.promote_types(local_BD.dtype, torch.float32)
    local_BD = local_BD.to(compute)
    batch_ND = all_gather_with_grad(local_BD)
    batch_ids_N = all_gather(place_ids_B)
    memory_MD, memory_ids_M, memory_steps_M = queue.entries()

    sim_BR = torch.cat([local_BD @ batch_ND.T, local_BD @ memory_MD.to(compute).T], dim=1)
    same_BR = place_ids_B[:, None] == torch.cat([batch_ids_N, memory_ids_M])[None, :]
    rows_B = torch.arange(len(local_BD), device=local_BD.device)
    positive_BR = same_BR.clone()
    positive_BR[rows_B, rows_B + dist.get_rank() * len(local_BD)] = False  # an image is no pair with itself

    age_M = (step - memory_steps_M).to(compute)
    log_weight_R = torch.cat([age_M.new_zeros(len(batch_ND)), -memory.decay_lambda * age_M])
    kept_positive_BR, kept_negative_BR = mine_multi_similarity(sim_BR, positive_BR, ~same_BR, loss.epsilon)
    losses_B = multi_similarity_loss(
        sim_BR, kept_positive_BR, kept_negative_BR, log_weight_R, alpha=loss.alpha, beta=loss.beta, base=loss.base
    )
    with torch.no_grad():
        mined_B = kept_positive_BR.any(dim=1) | kept_negative_BR.any(dim=1)
        hardest_negative_B = sim_BR.masked_fill(same_BR, -torch.inf).amax(dim=1)
        hardest_positive_B = sim_BR.masked_fill(~positive_BR, torch.inf).amin(dim=1)
        stats = {
            "trivial_anchors": 1 - mined_B.to(compute).mean(),
            "hardest_positive": hardest_positive_B.mean(),
            "hardest_negative": hardest_negative_B.mean(),
            "queue_fill": age_M.new_tensor(float(len(queue))),
            "queue_effective_size": torch.exp(-memory.decay_lambda * age_M).sum(),
        }
    return GlobalLossOutput(losses_B.mean(), batch_ND.detach(), batch_ids_N, stats)
