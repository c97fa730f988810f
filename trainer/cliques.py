"""Batches of places that are alike: greedy cliques among the nearest neighbours of a seed, in descriptor space.

A clique grows from a seed by the place that is most like all its members so far, as SAGE's greedy weighted clique
expansion (ICLR 2026) and, with random choices, CliqueMining (Izquierdo and Civera, ECCV 2024) do. Neighbours are
FAISS's. Beyond CELL_ROWS places a spherical k-means divides them into cells, and a clique is of one cell: so memory is
the descriptors and one cell in float32, and the search grows with the places, not with their square.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from data_pipeline.plan import Int64, random_order
from data_pipeline.utm import Floats
from eval.search_device import Find, flat

CELL_ROWS = 1 << 16
_SEEDS_AT_ONCE = 64
_PATIENCE = 32  # seeds in a row without a batch, after which a cell has none left
_WIDEN, _WIDEST = 4, 64  # a seed's neighbours are this many times more at each try, and at most
_SAMPLE_PER_CELL = 256  # FAISS's own choice for k-means
_ITERATIONS = 10

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """What is composed: `batches` of P places, each made of `cliques` of alike places, at least `min_m` metres apart.

    `points_N3` are the places' positions in metres; they are asked for only if `min_m` is above 0.
    """

    batches: int
    places_per_batch: int
    cliques: int = 1
    min_m: float = 0.0
    points_N3: Floats | None = None

    @property
    def sizes(self) -> list[int]:
        """Places of each clique of a batch, as equal as they can be."""
        least, more = divmod(self.places_per_batch, self.cliques)
        return [least + (number < more) for number in range(self.cliques)]


@dataclass(frozen=True)
class Alike:
    """Batches of alike rows int64 [H, P], and the mean cosine of two of a clique; `pool` is that of any two rows."""

    batches_HP: Int64
    similarity: float
    pool_similarity: float


def alike_batches(
    descriptors_ND: NDArray[np.float16], wanted: Wanted, bits: np.random.Philox, on_progress: OnProgress = untold
) -> Alike:
    """As many of the wanted batches as can be made of L2-normalised rows; no row is in two.

    `bits` gives the order of seeds and cells. Fewer come out where too few rows are left that are far enough apart.
    Equal arguments give equal batches on one machine with as many threads.
    """
    num_rows, made, cosines = len(descriptors_ND), 0, _Mean()
    batches_HP = np.empty((wanted.batches, wanted.places_per_batch), dtype=np.int64)
    seen = 0
    for rows in _cells(descriptors_ND, bits):
        seen += len(rows)
        # What one cell could not give is asked of the next.
        share = min(round(wanted.batches * seen / num_rows) - made, len(rows) // wanted.places_per_batch)
        cell = _Cell(descriptors_ND[rows].astype(np.float32), _points_of(wanted, rows), wanted)
        for batch in cell.batches(share, bits, cosines):
            batches_HP[made] = rows[batch]
            made += 1
            on_progress(made, wanted.batches)
    return Alike(batches_HP[:made], cosines.value(), _similarity_of_two(descriptors_ND))


def _points_of(wanted: Wanted, rows: Int64) -> Floats | None:
    return None if wanted.points_N3 is None or not wanted.min_m else wanted.points_N3[rows]


class _Mean:
    """A mean that grows."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, total: float, count: int) -> None:
        self.total, self.count = self.total + total, self.count + count

    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


class _Cell:
    """Rows of which each is free or in a batch."""

    def __init__(self, rows_ND: Rows, points_N3: Floats | None, wanted: Wanted) -> None:
        self.rows_ND, self.points_N3, self.wanted = rows_ND, points_N3, wanted
        self.free_N = np.ones(len(rows_ND), dtype=bool)
        self.near = _Neighbours(rows_ND, self.free_N)

    def batches(self, number: int, bits: np.random.Philox, cosines: _Mean) -> Iterator[list[int]]:
        """Up to `number` batches of row numbers."""
        seeds = deque(random_order(len(self.rows_ND), bits).tolist())
        made, failed = 0, 0
        while made < number and seeds and failed < _PATIENCE:
            batch: list[int] = []
            found = _Mean()
            for size in self.wanted.sizes:
                clique: list[int] = []
                while not clique and seeds and failed < _PATIENCE:
                    seed = seeds.popleft()
                    if not self.free_N[seed]:
                        continue
                    clique = self._clique(seed, seeds, size, batch, found)
                    failed = 0 if clique else failed + 1
                batch += clique
                self.free_N[clique] = False
            if len(batch) < self.wanted.places_per_batch:
                self.free_N[batch] = True
                return
            cosines.add(found.total, found.count)
            made += 1
            yield batch

    def _clique(self, seed: int, seeds: deque[int], size: int, batch: list[int], found: _Mean) -> list[int]:
        """A clique of `size` free rows around a seed, far from those of `batch`; empty if there is none."""
        least, widest = 4 * size + 16, _WIDEST * size
        num_free = int(np.count_nonzero(self.free_N))
        while True:
            near = self.near.of(seed, seeds, min(least, num_free))
            if clique := self._grown(near, size, batch, found):
                return clique
            if self.points_N3 is None or least >= min(widest, num_free):
                return []
            least *= _WIDEN

    def _grown(self, near_M: Int64, size: int, batch: list[int], found: _Mean) -> list[int]:
        """The clique that grows from the first of some free rows, its seed."""
        rows_MD = self.rows_ND[near_M]
        allowed_M = np.ones(len(near_M), dtype=bool)
        for member in batch:
            self._leave_out_near(allowed_M, near_M, member)
        score_M, members, total = np.zeros(len(near_M), dtype=np.float32), [0], 0.0
        if not allowed_M[0]:
            return []
        while True:
            last = members[-1]
            allowed_M[last] = False
            self._leave_out_near(allowed_M, near_M, int(near_M[last]))
            if len(members) == size:
                found.add(total, size * (size - 1) // 2)
                return [int(row) for row in near_M[members]]
            score_M += rows_MD @ rows_MD[last]
            best = int(np.where(allowed_M, score_M, -np.inf).argmax())
            if not allowed_M[best]:
                return []
            total += float(score_M[best])
            members.append(best)

    def _leave_out_near(self, allowed_M: NDArray[np.bool_], near_M: Int64, row: int) -> None:
        if self.points_N3 is not None:
            apart_M3 = self.points_N3[near_M] - self.points_N3[row]
            allowed_M &= np.einsum("mx,mx->m", apart_M3, apart_M3) >= self.wanted.min_m**2


class _Neighbours:
    """The free rows nearest to a seed, searched for several seeds at a time among rows of which most are free."""

    def __init__(self, rows_ND: Rows, free_N: NDArray[np.bool_]) -> None:
        self.rows_ND, self.free_N = rows_ND, free_N
        self.searched = np.arange(len(rows_ND))
        self.find: Find = flat(rows_ND)
        self.found: dict[int, Int64] = {}

    def of(self, seed: int, others: deque[int], least: int) -> Int64:
        """Free rows, the seed first and then from near to far; at least `least` if as many are free."""
        near = self._free(self.found.pop(seed, self.searched[:0]))
        if len(near) < least:
            near = self._search(seed, others, least)
        return np.concatenate([[seed], near[near != seed][: least - 1]]).astype(np.int64)

    def _search(self, seed: int, others: deque[int], least: int) -> Int64:
        if 2 * np.count_nonzero(self.free_N) < len(self.searched):
            self.searched = np.flatnonzero(self.free_N)
            self.find = flat(np.ascontiguousarray(self.rows_ND[self.searched]))
        queries, width = [seed, *self._next(others)], 2 * least
        while True:
            width = min(width, len(self.searched))
            _, ids = self.find(self.rows_ND[queries], width)
            lists = [self.searched[row[row >= 0]] for row in ids]
            near = self._free(lists[0])
            if len(near) >= least or width == len(self.searched):
                self.found = dict(zip(queries[1:], lists[1:], strict=True)) or self.found
                return near
            queries, width = [seed], 2 * width

    def _next(self, others: deque[int]) -> list[int]:
        """Free seeds that come next, whose neighbours are found along."""
        upcoming: list[int] = []
        for row in others:
            if len(upcoming) == _SEEDS_AT_ONCE - 1:
                break
            if self.free_N[row]:
                upcoming.append(row)
        return upcoming

    def _free(self, rows: Int64) -> Int64:
        return rows[self.free_N[rows]]


def _cells(descriptors_ND: NDArray[np.float16], bits: np.random.Philox) -> Iterator[Int64]:
    """The rows of each cell, ascending, cells in an order drawn; one cell where they are few."""
    num_rows, size = descriptors_ND.shape
    if num_rows <= CELL_ROWS:
        yield from [np.arange(num_rows)] if num_rows else []
        return
    number = -(-2 * num_rows // CELL_ROWS)  # cells are not equal: half of CELL_ROWS on average
    sample = np.sort(random_order(num_rows, bits)[: number * _SAMPLE_PER_CELL])
    kmeans = faiss.Kmeans(size, number, niter=_ITERATIONS, spherical=True, seed=1)
    kmeans.train(descriptors_ND[sample].astype(np.float32))
    centroids_CD, cell_N = np.asarray(kmeans.centroids), np.empty(num_rows, dtype=np.int64)
    for start in range(0, num_rows, CELL_ROWS):
        part = slice(start, start + CELL_ROWS)
        cell_N[part] = (descriptors_ND[part].astype(np.float32) @ centroids_CD.T).argmax(axis=1)
    order = np.argsort(cell_N, kind="stable")
    ends = np.cumsum(np.bincount(cell_N, minlength=number))
    members = np.split(order, ends[:-1])
    for cell in random_order(number, bits).tolist():
        yield members[cell]


def _similarity_of_two(descriptors_ND: NDArray[np.float16]) -> float:
    """The mean cosine of two different rows, from the length of their sum."""
    num_rows, size = descriptors_ND.shape
    total_D = np.zeros(size)
    for start in range(0, num_rows, CELL_ROWS):
        total_D += descriptors_ND[start : start + CELL_ROWS].sum(axis=0, dtype=np.float64)
    return float((total_D @ total_D - num_rows) / max(1, num_rows * (num_rows - 1)))
