"""A memory queue for each data set, as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from memory.place_sets import PlaceSets
from memory.queue import MemoryQueue, check_shards


class SetQueues(nn.Module):
    """The queues of S data sets, all placed alike; what is stored goes into the queue of its set."""

    def __init__(self, queues: Sequence[MemoryQueue], sets: PlaceSets) -> None:
        super().__init__()
        self.sets, self.queues, self.placement = sets, nn.ModuleList(queues), queues[0].placement
        self.rank, self.num_shards = queues[0].rank, queues[0].num_shards

    def __len__(self) -> int:
        """Number of descriptors held, over all sets and ranks."""
        return sum(len(self.of_set(number)) for number in range(len(self.sets)))

    def of_set(self, number: int) -> MemoryQueue:
        """The queue of a set."""
        queue = self.queues[number]
        assert isinstance(queue, MemoryQueue)
        return queue

    def enqueue(
        self, descriptors_ND: Tensor, place_ids_N: Tensor, step: int, *, host_ids_N: Tensor | None = None
    ) -> None:
        """Stores the global batch of a step, each set's images in its queue; see `MemoryQueue.enqueue`."""
        known = host_ids_N if host_ids_N is not None else place_ids_N.cpu()
        for number, rows in enumerate(self.sets.rows(known, place_ids_N.device)):
            self.of_set(number).enqueue(
                descriptors_ND[rows.device_n],
                place_ids_N[rows.device_n],
                step,
                host_ids_N=known[rows.host_n],
            )

    @torch.no_grad()
    def load_shards(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Takes over queues saved by any number of ranks in any placement; see `MemoryQueue.load_shards`."""
        given: set[int] = set()
        expected = 1
        for state in states:
            saved = {key.split(".")[1] for key in state if key.startswith("queues.")}
            if saved != {str(number) for number in range(len(self.sets))}:
                raise ValueError(f"the saved queue is one of {len(saved) or 1} sets, this one of {len(self.sets)}")
            for number in range(len(self.sets)):
                prefix = f"queues.{number}."
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                shard, expected = self.of_set(number).load_shard(own)
            given.add(shard)
        check_shards(given, expected)
