"""The losses written down once more, dense and in one process, to compare with: masks, full matrices, autograd."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Anchors against references; where an image meets itself, if at all; the weight of each reference."""

    anchors_ND: torch.Tensor
    ids_N: torch.Tensor
    references_RD: torch.Tensor
    ids_R: torch.Tensor
    weight_R: torch.Tensor
    live: bool
    near_NR: torch.Tensor | None = None  # pairs whose places are too near to be negatives

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Similarities, positives and negatives [N, R]; the first N references are the anchors' own copies."""
        same = self.ids_N[:, None] == self.ids_R
        own = torch.zeros_like(same)
        own[:, : len(self.ids_N)] = torch.eye(len(self.ids_N), dtype=torch.bool)
        apart = ~same if self.near_NR is None else ~same & ~self.near_NR
        return self.anchors_ND @ self.references_RD.T, same & ~own, apart


def distance(similarity: torch.Tensor) -> torch.Tensor:
    return (2 - 2 * similarity).clamp(min=1e-30).sqrt()


def mine(miner: str, batch: Batch) -> torch.Tensor:
    """The triplets [N, R, R] that a miner keeps; of a miner of pairs, all combinations of an anchor's pairs."""
    similarity, positive, negative = batch.pairs()
    similarity = similarity.detach()
    if miner == "TripletMarginMiner":
        d = distance(similarity)
        return positive[:, :, None] & negative[:, None, :] & (d[:, None, :] - d[:, :, None] <= 0.2)
    positive, negative = mine_pairs(miner, batch)
    return positive[:, :, None] & negative[:, None, :]


def mine_pairs(miner: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The positive and negative pairs [N, R] that a miner keeps."""
    similarity, positive, negative = batch.pairs()
    similarity = similarity.detach()
    if miner == "none":
        return positive, negative
    if miner == "TripletMarginMiner":
        triplets = mine(miner, batch)
        return triplets.any(2), triplets.any(1)
    hardest_negative = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    if not batch.live:
        hardest_positive = hardest_positive.clamp(max=1)
    return positive & (similarity - 0.1 < hardest_negative), negative & (similarity + 0.1 > hardest_positive)


def dense_loss(name: str, miner: str, batch: Batch) -> torch.Tensor:
    """The loss by name, with alpha 2, beta 50, base 0.5 and the library's other defaults."""
    similarity, positive, negative = batch.pairs()
    kept_positive, kept_negative = mine_pairs(miner, batch)
    triplets = mine(miner, batch) if miner == "TripletMarginMiner" else None
    zero = batch.anchors_ND.sum() * 0
    if name == "MultiSimilarityLoss":
        pull = (torch.exp(-2 * (similarity - 0.5)) * kept_positive).sum(1)
        push = (batch.weight_R * torch.exp(50 * (similarity - 0.5)) * kept_negative).sum(1)
        return (pull.log1p() / 2 + push.log1p() / 50).mean()
    d = distance(similarity)
    if name == "TripletMarginLoss":
        violation = (d[:, :, None] - d[:, None, :] + 0.05).relu() * mine(miner, batch)
        return zero + (violation * batch.weight_R).sum() / (violation > 0).sum().clamp(min=1)
    if name == "ContrastiveLoss":
        times_positive = kept_positive if triplets is None else triplets.sum(2)
        times_negative = kept_negative if triplets is None else triplets.sum(1)
        pull, push = d, (1 - d).relu()
        return (
            zero
            + (times_positive * pull).sum() / (times_positive * (pull > 0)).sum().clamp(min=1)
            + (times_negative * batch.weight_R * push).sum() / (times_negative * (push > 0)).sum().clamp(min=1)
        )
    assert name == "NCALoss"
    mass = torch.exp(2 * similarity - 2)
    place = (mass * positive).sum(1) + (0 if batch.live else 1)
    others = (mass * negative * batch.weight_R).sum(1)
    counted = place > 0
    ratio = place[counted] / (place + others)[counted]
    return zero - (anchor_weights(miner, batch)[counted] * ratio.log()).sum() / counted.sum().clamp(min=1)


def anchor_weights(miner: str, batch: Batch) -> torch.Tensor:
    """Mined pairs that each image is in (as anchor alone where references are detached), over the greatest."""
    n = len(batch.ids_N)
    if miner == "none":
        return torch.ones(n, dtype=batch.anchors_ND.dtype)
    if miner == "TripletMarginMiner":
        triplets = mine(miner, batch)
        counts, as_positive, as_negative = triplets.sum((1, 2)), triplets.sum((0, 2)), triplets.sum((0, 1))
    else:
        positive, negative = mine_pairs(miner, batch)
        counts, as_positive, as_negative = positive.sum(1) + negative.sum(1), positive.sum(0), negative.sum(0)
    if batch.live:
        counts = counts + as_positive[:n] + as_negative[:n]
    counts = counts.to(batch.anchors_ND)
    return counts / counts.max() if counts.any() else torch.ones(n, dtype=batch.anchors_ND.dtype)
