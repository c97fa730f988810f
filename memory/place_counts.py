"""How many references of each place there are, known on the host so that nobody asks the device."""

from __future__ import annotations

from collections import Counter

import torch

from memory.queue import MemoryQueue


def references_of_places(place_ids_A: torch.Tensor, batch_ids_N: torch.Tensor, queue: MemoryQueue) -> list[int]:
    """How many images of the batch and entries of the queue have the place of each anchor; all ids on the host."""
    in_batch = Counter(batch_ids_N.tolist())
    in_queue = queue.count_by_place()
    return [in_batch[place] + in_queue[place] for place in place_ids_A.tolist()]
