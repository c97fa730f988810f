"""Pairs of a query and a candidate, in blocks that fit the memory and are shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from eval.features import Patches, StoredFeatures
from eval.matching import pair_bytes

MAX_QUERIES_PER_BLOCK = 16
CPU_BATCH_BYTES = 24 << 20  # on a CPU, larger batches leave its caches: half as fast


class Plan(NamedTuple):
    """How pairs are batched: `queries` at a time, with `candidates` of each at a time."""

    queries: int
    candidates: int


@dataclass(frozen=True)
class Candidates:
    """Q queries with T images of a database each; `query_ids_Q` and `ids_QT` are their rows among stored features."""

    queries: StoredFeatures
    query_ids_Q: NDArray[np.int64]
    database: StoredFeatures
    ids_QT: NDArray[np.int64]


@dataclass(frozen=True)
class PairBlock:
    """B queries with T candidates each: which rows and columns of the candidates they are, and their patches.

    Candidates of query b are rows b * T to b * T + T of `candidates`.
    """

    rows: slice
    columns: slice
    queries: Patches
    candidates: Patches


def plan_batches(
    queries: StoredFeatures, database: StoredFeatures, depth: int, memory_mb: int, device: torch.device
) -> Plan:
    """Batches that stay below `memory_mb`, and on a CPU near its caches; the same at any number of ranks.

    Raises ValueError if one pair of images does not fit.
    """
    bound = memory_mb << 20
    own = 8 * queries.max_patches * database.channels
    pair = pair_bytes(queries.max_patches, database.max_patches, database.channels)
    if own + pair > bound:
        raise ValueError(
            f"rerank.memory_mb {memory_mb}: one pair of images takes {(own + pair) / 2**20:.1f} MB; allow at least "
            f"{-(-(own + pair) // 2**20)}"
        )
    if device.type == "cpu":
        bound = min(bound, max(CPU_BATCH_BYTES, own + pair))
    if own + depth * pair > bound:
        return Plan(1, (bound - own) // pair)
    return Plan(max(1, min(MAX_QUERIES_PER_BLOCK, bound // (own + depth * pair))), depth)


def pair_blocks(
    pairs: Candidates,
    memory_mb: int,
    device: torch.device,
    on_progress: OnProgress = untold,
    share: tuple[int, int] | None = None,
) -> Iterator[PairBlock]:
    """This rank's blocks: blocks of queries go to ranks in turn, so that each pair is one rank's.

    `share` is (rank, world size); those of the process group without it.

    `on_progress` gets the queries up to the last one of each block.
    """
    count, depth = pairs.ids_QT.shape
    plan = plan_batches(pairs.queries, pairs.database, depth, memory_mb, device)
    blocks = [slice(first, min(count, first + plan.queries)) for first in range(0, count, plan.queries)]
    rank, world = share or (dist.get_rank(), dist.get_world_size())
    for rows in blocks[rank::world]:
        own = pairs.queries.patches(pairs.query_ids_Q[rows], device)
        for start in range(0, depth, plan.candidates):
            columns = slice(start, start + plan.candidates)
            others = pairs.database.patches(pairs.ids_QT[rows, columns].ravel(), device)
            yield PairBlock(rows, columns, own, others)
        on_progress(rows.stop, count)
