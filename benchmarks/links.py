"""How long H100s would take for a step that was counted: from published speeds of chips and links, nothing measured."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from benchmarks.simulated_step import ROUNDS, Sent, Simulated


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 H100 SXM and what joins them; the figures are NVIDIA's, the shares that are reached are assumed.

    Latencies are those of NCCL's own cost model (src/graph/tuning.cc, protocol LL128), its rings and trees too.
    """

    gpus: int = 8  # of a node
    nvlink: float = 450e9  # bytes/s of a GPU in each direction: half of NVLink 4's 900 GB/s
    nic: float = 50e9  # bytes/s of a GPU in each direction: a ConnectX-7 of 400 Gb/s for each
    links_reach: float = 0.8
    bf16: float = 989e12  # operations/s, dense
    fp32: float = 67e12
    memory: float = 3.35e12  # bytes/s
    bf16_reaches: float = 0.4
    fp32_reaches: float = 0.5
    memory_reaches: float = 0.8
    base_s: float = 14e-6  # of a collective
    nvlink_hop_s: float = 1.9e-6  # ring
    net_hop_s: float = 4.0e-6
    nvlink_tree_s: float = 1.25e-6
    net_tree_s: float = 8.5e-6

    def bus(self, ranks: int) -> float:
        """Bytes/s that pass each GPU of a ring, which crosses a node's border on all of its network cards at once."""
        across = min(self.nvlink, self.gpus * self.nic) if ranks > self.gpus else self.nvlink
        return across * self.links_reach

    def seconds(self, sent: Sent) -> float:
        """Of one collective: the faster of ring and, for an all-reduce, tree."""
        ranks, nodes = sent.ranks, max(1, sent.ranks // self.gpus)
        if ranks < 2:
            return 0.0
        rounds = ROUNDS.get(sent.kind, 1)
        steps, across = rounds * (ranks - 1), rounds * (nodes - 1)
        ring = self.base_s + (steps - across) * self.nvlink_hop_s + across * self.net_hop_s
        ring += sent.wire_bytes / self.bus(ranks)
        if sent.kind != "all_reduce":
            return ring
        hops = (min(ranks, self.gpus) - 1) * self.nvlink_tree_s + math.log2(nodes) * self.net_tree_s
        return min(ring, self.base_s + 2 * hops + 2 * sent.num_bytes / self.bus(ranks))

    def seconds_in_two_levels(self, sent: Sent) -> float:
        """Of a gather (or, backwards, a scatter) among ranks of one place in their nodes, then within each node.

        Fewer hops, but each link works in one half only, and rows are put in the order of ranks by a copy.
        """
        nodes = sent.ranks // self.gpus
        if nodes < 2:
            return self.seconds(sent)
        across = self.base_s + (nodes - 1) * self.net_hop_s
        across += (nodes - 1) / nodes * sent.num_bytes / self.gpus / (self.nic * self.links_reach)
        within = self.base_s + (self.gpus - 1) * self.nvlink_hop_s
        within += (self.gpus - 1) / self.gpus * sent.num_bytes / (self.nvlink * self.links_reach)
        return across + within + self.passes(2 * sent.num_bytes)

    def passes(self, num_bytes: float) -> float:
        """Seconds in which a GPU reads or writes so many bytes of its memory."""
        return num_bytes / (self.memory * self.memory_reaches)


def shortened(counted: Simulated, cluster: Cluster) -> dict[str, float]:
    """Seconds of the gather of descriptors and of its way back: as they are, and as they could be.

    In 16 bits the way out alone, of which the rows are then widened; the way back adds up over ranks.
    """
    found: dict[str, float] = defaultdict(float)
    for sent, count in counted.sent.items():
        if sent.purpose not in ("descriptors, gathered", "descriptors' gradients, scattered"):
            continue
        half = replace(sent, num_bytes=sent.num_bytes // 2)
        widened = cluster.passes(1.5 * sent.num_bytes)
        out = sent.kind == "all_gather"
        found["as it is"] += count * cluster.seconds(sent)
        found["two levels"] += count * cluster.seconds_in_two_levels(sent)
        found["16 bits out"] += count * (cluster.seconds(half) + widened if out else cluster.seconds(sent))
        found["both"] += count * (
            cluster.seconds_in_two_levels(half) + widened if out else cluster.seconds_in_two_levels(sent)
        )
    return dict(found)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are for."""

    network: float  # matrix products of the model's precision, with all that goes beside them
    loss: float
    sending: dict[str, float]  # by purpose
    overlapped: float  # of sending, what computation hides

    @property
    def total(self) -> float:
        """The whole step."""
        return self.network + self.loss + sum(self.sending.values()) - self.overlapped


def step_time(counted: Simulated, cluster: Cluster, *, zero_stage: int, overlap: bool = False) -> StepTime:
    """Time of a step, nothing else slowing it: no data, no host, no rank late.

    At stage 3 DeepSpeed gathers weights ahead and reduces gradients beside the backward pass, so computation hides as
    much as it lasts; with engine.overlap backward (two thirds of the network's time) hides all buckets of gradients but
    the last; else the GPU waits for each collective.
    """
    network = loss = 0.0
    for (section, dtype), operations in counted.flops.items():
        if dtype in ("bfloat16", "float16"):
            network += operations / (cluster.bf16 * cluster.bf16_reaches)
        else:
            seconds = operations / (cluster.fp32 * cluster.fp32_reaches)
            loss, network = (loss + seconds, network) if section == "loss" else (loss, network + seconds)
    loss += counted.touched["loss"] / (cluster.memory * cluster.memory_reaches)
    sending: dict[str, float] = defaultdict(float)
    for sent, count in counted.sent.items():
        sending[sent.purpose] += count * cluster.seconds(sent)
    gradients = sending["gradients, reduced"]
    if zero_stage == 3:
        hidden = min(network, sending["weights, gathered for use"] + gradients)
    elif overlap:
        buckets = sum(count for sent, count in counted.sent.items() if sent.purpose == "gradients, reduced")
        hidden = min(network * 2 / 3, gradients * (1 - 1 / buckets))
    else:
        hidden = 0.0
    return StepTime(network, loss, dict(sending), hidden)
