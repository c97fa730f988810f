"""The memory queue: past descriptors with their place and the step that stored them, the same on every rank."""

from __future__ import annotations

import torch
from torch import nn


class MemoryQueue(nn.Module):
    """First in, first out, of M (descriptor, place_id, step) triples; equal in content and order on all ranks."""

    descriptors_MD: torch.Tensor
    place_ids_M: torch.Tensor
    steps_M: torch.Tensor
    num_enqueued: torch.Tensor

    def __init__(self, size: int, descriptor_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.size = size
        self.register_buffer("descriptors_MD", torch.zeros(size, descriptor_size, device=device))
        self.register_buffer("place_ids_M", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("steps_M", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Number of descriptors held."""
        return min(self.size, int(self.num_enqueued))

    @torch.no_grad()
    def enqueue(self, descriptors_ND: torch.Tensor, place_ids_N: torch.Tensor, step: int) -> None:
        """Stores the global batch of a step, oldest entries making room; of more than M rows the last M stay."""
        n = len(descriptors_ND)
        if self.size:
            kept = slice(max(0, n - self.size), n)
            positions = torch.arange(kept.start, n, device=self.steps_M.device) + int(self.num_enqueued)
            slots = positions % self.size
            self.descriptors_MD[slots] = descriptors_ND[kept].to(self.descriptors_MD)
            self.place_ids_M[slots] = place_ids_N[kept]
            self.steps_M[slots] = step
        self.num_enqueued += n

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Descriptors [n, D], place ids [n] and steps [n] of the n held entries, in slot order."""
        n = len(self)
        return self.descriptors_MD[:n], self.place_ids_M[:n], self.steps_M[:n]
