"""Which anchors meet which references on a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from memory.place_counts import references_of_places
from memory.queue import MemoryQueue
from memory.tiles import ReferenceRanks


@dataclass(frozen=True)
class GlobalBatch:
    """The images of a step: this rank's B descriptors, and the places of all N images in the order of ranks."""

    local_BD: torch.Tensor
    local_ids_B: torch.Tensor
    ids_N: torch.Tensor
    host_ids_N: torch.Tensor | None = None  # the same on the host, if they are known there

    @property
    def start(self) -> int:
        """Place of this rank's first image in the global batch."""
        return dist.get_rank() * len(self.local_BD)


class Memory(NamedTuple):
    """The memory entries that anchors meet on this rank."""

    descriptors_mD: torch.Tensor
    age_m: torch.Tensor  # optimizer steps, floating point
    log_weight_m: torch.Tensor
    place_ids_m: torch.Tensor


@dataclass(frozen=True)
class Pairing:
    """A anchors, the references that they meet on this rank, and what is known of both.

    References over all ranks are the G = N + n images of the batch and entries of the queue, in slot order; this rank
    compares with C of the batch and m of the memory.
    """

    anchors_AD: torch.Tensor
    anchor_ids_A: torch.Tensor
    anchor_start: int  # place of the first anchor in the global batch
    batch_CD: torch.Tensor
    batch_start: int  # place of the first of these in the global batch
    batch_size: int  # N
    memory: Memory
    reference_ids_G: torch.Tensor
    column_G: torch.Tensor  # each reference's column on this rank; -1 if another rank holds it
    widest: int  # most columns on any rank
    ranks: ReferenceRanks
    live: bool  # batch references carry gradient
    counts: NDArray[np.int64] | None  # references of each anchor's place, itself too; None if the host does not know

    def column_ids(self) -> torch.Tensor:
        """The place of each of this rank's columns [C + m]."""
        batch_ids_C = self.reference_ids_G[self.batch_start : self.batch_start + len(self.batch_CD)]
        return torch.cat([batch_ids_C, self.memory.place_ids_m])

    @classmethod
    def replicated(
        cls, batch: GlobalBatch, batch_ND: torch.Tensor, queue: MemoryQueue, memory: Memory, *, live: bool
    ) -> Pairing:
        """This rank's anchors against all references, which every rank holds."""
        reference_ids_G = torch.cat([batch.ids_N, queue.place_ids_M[: len(queue)]])
        return cls(
            anchors_AD=batch.local_BD,
            anchor_ids_A=batch.local_ids_B,
            anchor_start=batch.start,
            batch_CD=batch_ND if live else batch_ND.detach(),
            batch_start=0,
            batch_size=len(batch.ids_N),
            memory=memory,
            reference_ids_G=reference_ids_G,
            column_G=torch.arange(len(reference_ids_G), device=reference_ids_G.device),
            widest=len(reference_ids_G),
            ranks=ReferenceRanks(all_of_them=False),
            live=live,
            counts=_counts(batch, queue, slice(batch.start, batch.start + len(batch.local_BD))),
        )

    @classmethod
    def sharded(
        cls, batch: GlobalBatch, batch_ND: torch.Tensor, queue: MemoryQueue, memory: Memory, *, live: bool
    ) -> Pairing:
        """The anchors of all ranks against this rank's references: its images, and its slots of the queue."""
        held, num_local = len(queue), len(batch.local_BD)
        reference_ids_G = torch.cat([batch.ids_N, queue.place_ids_M[:held]])
        column_G = torch.full_like(reference_ids_G, -1)
        column_G[batch.start : batch.start + num_local] = torch.arange(num_local, device=column_G.device)
        own = torch.arange(held, device=column_G.device)[queue.rank :: queue.num_shards]
        column_G[len(batch.ids_N) + own] = num_local + own // queue.num_shards
        return cls(
            anchors_AD=batch_ND,
            anchor_ids_A=batch.ids_N,
            anchor_start=0,
            batch_CD=batch.local_BD if live else batch.local_BD.detach(),
            batch_start=batch.start,
            batch_size=len(batch.ids_N),
            memory=memory,
            reference_ids_G=reference_ids_G,
            column_G=column_G,
            widest=num_local + math.ceil(held / queue.num_shards),
            ranks=ReferenceRanks(all_of_them=True),
            live=live,
            counts=_counts(batch, queue, slice(None)),
        )


def _counts(batch: GlobalBatch, queue: MemoryQueue, anchors: slice) -> NDArray[np.int64] | None:
    if batch.host_ids_N is None:
        return None
    return references_of_places(batch.host_ids_N[anchors], batch.host_ids_N, queue.host_ids())
