"""The memory queue: past descriptors with their place and the step that stored them, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

Placement = Literal["replicated", "sharded"]


class Entries(NamedTuple):
    """Held entries, in slot order."""

    descriptors_nD: torch.Tensor
    place_ids_n: torch.Tensor
    steps_n: torch.Tensor


class MemoryQueue(nn.Module):
    """First in, first out, of M (descriptor, place_id, step) triples; one content and order over all ranks.

    `replicated` keeps all descriptors on each rank. `sharded` keeps those of slots r, r + W, r + 2W... on rank r of W,
    so that the ranks hold equally many at any fill; place ids and steps (16 bytes an entry) are on every rank in both.
    """

    descriptors_mD: torch.Tensor
    place_ids_M: torch.Tensor
    steps_M: torch.Tensor
    num_enqueued: torch.Tensor
    shard: torch.Tensor

    def __init__(
        self,
        size: int,
        descriptor_size: int,
        device: torch.device | str = "cpu",
        *,
        placement: Placement = "replicated",
    ) -> None:
        super().__init__()
        self.size, self.placement = size, placement
        self.rank, self.num_shards = (dist.get_rank(), dist.get_world_size()) if placement == "sharded" else (0, 1)
        rows = len(range(self.rank, size, self.num_shards))
        self.register_buffer("descriptors_mD", torch.zeros(rows, descriptor_size, device=device))
        self.register_buffer("place_ids_M", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("steps_M", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shard", torch.tensor([self.rank, self.num_shards]))

    def __len__(self) -> int:
        """Number of descriptors held, over all ranks."""
        return min(self.size, int(self.num_enqueued))

    @torch.no_grad()
    def enqueue(self, descriptors_ND: torch.Tensor, place_ids_N: torch.Tensor, step: int) -> None:
        """Stores the global batch of a step, oldest entries making room; of more than M rows the last M stay."""
        n = len(descriptors_ND)
        if self.size:
            kept = torch.arange(max(0, n - self.size), n)
            slots = (kept + int(self.num_enqueued)) % self.size
            mine = slots % self.num_shards == self.rank
            device = self.steps_M.device
            rows = (slots[mine] // self.num_shards).to(device)
            self.descriptors_mD[rows] = descriptors_ND[kept[mine].to(device)].to(self.descriptors_mD)
            kept, slots = kept.to(device), slots.to(device)
            self.place_ids_M[slots] = place_ids_N[kept]
            self.steps_M[slots] = step
        self.num_enqueued += n

    def entries(self) -> Entries:
        """The held entries whose descriptors this rank keeps: all of them when replicated, about n/W when sharded."""
        held = slice(self.rank, len(self), self.num_shards)
        rows = len(range(held.start, held.stop, held.step))
        return Entries(self.descriptors_mD[:rows], self.place_ids_M[held], self.steps_M[held])

    def steps(self) -> torch.Tensor:
        """The step that stored each held entry [n], of all ranks."""
        return self.steps_M[: len(self)]

    @torch.no_grad()
    def load_shards(self, states: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Takes over a queue saved by any number of ranks in any placement: every entry, its order and its age.

        `states` are the state dicts of the ranks that saved (of rank 0 alone when they were replicas), one at a time.
        Raises ValueError if they are of another size or not all there.
        """
        found, expected = set(), 1
        for state in states:
            size, descriptor_size = len(state["place_ids_M"]), state["descriptors_mD"].shape[1]
            if (size, descriptor_size) != (self.size, self.descriptors_mD.shape[1]):
                raise ValueError(
                    f"the saved queue holds {size} descriptors of {descriptor_size}, this one {self.size} of "
                    f"{self.descriptors_mD.shape[1]}; memory.size and the model must be those of the checkpoint"
                )
            shard, expected = (int(value) for value in state["shard"])
            found.add(shard)
            slots = torch.arange(shard, size, expected)
            mine = slots % self.num_shards == self.rank
            rows = (slots[mine] // self.num_shards).to(self.descriptors_mD.device)
            self.descriptors_mD[rows] = state["descriptors_mD"][mine].to(self.descriptors_mD)
            for name in ("place_ids_M", "steps_M", "num_enqueued"):
                getattr(self, name).copy_(state[name])
        if found != set(range(expected)):
            raise ValueError(f"the saved queue has {expected} shards, of which {sorted(found)} were given")
