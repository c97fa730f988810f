"""Metric-learning losses over a block of anchors against all references, with weights on the negatives."""

from __future__ import annotations

import torch


def mine_multi_similarity(
    sim_AR: torch.Tensor, positive_AR: torch.Tensor, negative_AR: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positive and negative pairs that the Multi-Similarity miner keeps (bool [A, R] each).

    A positive is kept if it is less similar than the hardest negative plus epsilon, a negative if it is more similar
    than the hardest positive minus epsilon (Wang et al., CVPR 2019, as in pytorch-metric-learning).
    """
    sim_AR = sim_AR.detach()
    hardest_negative_A1 = sim_AR.masked_fill(~negative_AR, -torch.inf).amax(dim=1, keepdim=True)
    hardest_positive_A1 = sim_AR.masked_fill(~positive_AR, torch.inf).amin(dim=1, keepdim=True)
    keep_positive_AR = positive_AR & (sim_AR - epsilon < hardest_negative_A1)
    keep_negative_AR = negative_AR & (sim_AR + epsilon > hardest_positive_A1)
    return keep_positive_AR, keep_negative_AR


def multi_similarity_loss(
    sim_AR: torch.Tensor,
    positive_AR: torch.Tensor,
    negative_AR: torch.Tensor,
    log_weight_R: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    base: float,
) -> torch.Tensor:
    """Multi-Similarity loss of each anchor [A], in log-sum-exp form.

    L_i = 1/alpha log(1 + sum_p exp(-alpha (s_ip - base))) + 1/beta log(1 + sum_n w_n exp(beta (s_in - base)))
    with log w_n given per reference (0 leaves it as it is). Wang et al., CVPR 2019; the age weight is RerankVPR's.
    """
    zero_A1 = sim_AR.new_zeros(len(sim_AR), 1)
    pull_AR = (-alpha * (sim_AR - base)).masked_fill(~positive_AR, -torch.inf)
    push_AR = (beta * (sim_AR - base) + log_weight_R).masked_fill(~negative_AR, -torch.inf)
    pull_A = torch.logsumexp(torch.cat([zero_A1, pull_AR], dim=1), dim=1) / alpha
    push_A = torch.logsumexp(torch.cat([zero_A1, push_AR], dim=1), dim=1) / beta
    return pull_A + push_A
