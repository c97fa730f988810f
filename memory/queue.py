"""The memory queue: past descriptors with their place and the step that stored them, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

Placement = Literal["replicated", "sharded"]
EMPTY = -1  # place id of a slot that holds nothing


class Entries(NamedTuple):
    """Held entries, in slot order."""

    descriptors_nD: torch.Tensor
    place_ids_n: torch.Tensor
    steps_n: torch.Tensor


class _HostIds:
    """The place ids of a queue on the host."""

    def __init__(self, place_ids_M: torch.Tensor) -> None:
        self.ids_M = place_ids_M.cpu().clone()
        self.belongs_to(place_ids_M)

    def belongs_to(self, place_ids_M: torch.Tensor) -> None:
        """Says that these are the device's ids as they are."""
        self._of, self._version = place_ids_M, place_ids_M._version

    def still_of(self, place_ids_M: torch.Tensor) -> bool:
        """Whether nobody has written to the device's ids since."""
        return self._of is place_ids_M and self._version == place_ids_M._version


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
        self.register_buffer("place_ids_M", torch.full((size,), EMPTY, dtype=torch.int64, device=device))
        self.register_buffer("steps_M", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shard", torch.tensor([self.rank, self.num_shards]))
        self._known: _HostIds | None = None

    def __len__(self) -> int:
        """Number of descriptors held, over all ranks."""
        return min(self.size, int(self.num_enqueued))

    @torch.no_grad()
    def enqueue(
        self,
        descriptors_ND: torch.Tensor,
        place_ids_N: torch.Tensor,
        step: int,
        *,
        host_ids_N: torch.Tensor | None = None,
    ) -> None:
        """Stores the global batch of a step, oldest entries making room; of more than M rows the last M stay.

        `host_ids_N` are the same place ids on the host, if they are known there: `host_ids` then need not ask the
        device for them.
        """
        n = len(descriptors_ND)
        known = self._host_ids() if host_ids_N is not None else None
        first, row = int(self.num_enqueued) + max(0, n - self.size), max(0, n - self.size)
        while row < n and self.size:
            slot = first % self.size
            count = min(n - row, self.size - slot)  # up to the last slot; what is left begins at slot 0
            mine = (self.rank - slot) % self.num_shards  # of these the first that this rank keeps
            rows_kD = descriptors_ND[row + mine : row + count : self.num_shards]
            start = (slot + mine) // self.num_shards
            self.descriptors_mD[start : start + len(rows_kD)] = rows_kD
            self.place_ids_M[slot : slot + count] = place_ids_N[row : row + count]
            self.steps_M[slot : slot + count] = step
            if known is not None and host_ids_N is not None:
                known.ids_M[slot : slot + count] = host_ids_N[row : row + count]
            first, row = first + count, row + count
        if known is not None:
            known.belongs_to(self.place_ids_M)
        self.num_enqueued += n

    def host_ids(self) -> torch.Tensor:
        """The place of each held entry [n] on the host, of all ranks, in slot order.

        Asks the device only if ids were stored that the host missed.
        """
        return self._host_ids().ids_M[: len(self)]

    def _host_ids(self) -> _HostIds:
        if self._known is None or not self._known.still_of(self.place_ids_M):
            self._known = _HostIds(self.place_ids_M)
        return self._known

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
        given, expected = set[int](), 1
        for state in states:
            shard, expected = self.load_shard(state)
            given.add(shard)
        check_shards(given, expected)

    @torch.no_grad()
    def load_shard(self, state: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Takes over what one rank saved; its number, and how many there are. Raises ValueError for another size."""
        size, descriptor_size = len(state["place_ids_M"]), state["descriptors_mD"].shape[1]
        if (size, descriptor_size) != (self.size, self.descriptors_mD.shape[1]):
            raise ValueError(
                f"the saved queue holds {size} descriptors of {descriptor_size}, this one {self.size} of "
                f"{self.descriptors_mD.shape[1]}; memory.size and the model must be those of the checkpoint"
            )
        shard, expected = (int(value) for value in state["shard"])
        slots = torch.arange(shard, size, expected)
        mine = slots % self.num_shards == self.rank
        rows = (slots[mine] // self.num_shards).to(self.descriptors_mD.device)
        self.descriptors_mD[rows] = state["descriptors_mD"][mine].to(self.descriptors_mD)
        for name in ("place_ids_M", "steps_M", "num_enqueued"):
            getattr(self, name).copy_(state[name])
        return shard, expected


def check_shards(given: set[int], expected: int) -> None:
    """Raises ValueError unless all `expected` shards of a saved queue were given."""
    if given != set(range(expected)):
        raise ValueError(f"the saved queue has {expected} shards, of which {sorted(given)} were given")
