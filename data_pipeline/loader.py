"""Place batches: the rank's share of each global step of an epoch plan, as uint8 images."""

from __future__ import annotations

import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.schema import DataConfig
from data_pipeline.images import decode
from data_pipeline.index import ShardIndex
from data_pipeline.plan import EpochPlan


@dataclass(frozen=True)
class PlaceBatch:
    """A rank's share of a global step: B = P/W * K images, those of a place together."""

    images_B3HW: torch.Tensor  # uint8
    place_ids_B: torch.Tensor  # int64
    views_B: torch.Tensor  # int64


class TooManyBadImagesError(RuntimeError):
    """More unreadable images than data.max_bad_images."""


class PlaceLoader:
    """Reads places from tar shards, one range read a place, and decodes their planned views in threads.

    A view whose bytes differ from the index's crc32, or do not decode, is replaced by the next view of the same place,
    so the replacement depends on nothing but the plan; it is named on stderr once and counted, and more than
    data.max_bad_images of them on a rank stop the run.
    """

    def __init__(self, index: ShardIndex, config: DataConfig, *, rank: int, world_size: int) -> None:
        self.index, self.config = index, config
        self.rank, self.world_size = rank, world_size
        self.bad_images: dict[tuple[int, int], str] = {}
        self._files: dict[Path, int] = {}

    @property
    def num_bad_images(self) -> int:
        """Distinct unreadable images met on this rank."""
        return len(self.bad_images)

    def batches(self, plan: EpochPlan, steps: Iterable[int]) -> Iterator[PlaceBatch]:
        """This rank's share of the given steps of an epoch, decoded ahead of the caller."""
        threads = self.config.decode_threads
        if threads == 0:
            for step in steps:
                places, views_PK = plan.rank_slice(step, self.rank, self.world_size)
                yield self._batch(
                    places, views_PK, [self._read_place(p, v) for p, v in zip(places, views_PK, strict=True)]
                )
            return
        waiting: deque[tuple[np.ndarray, np.ndarray, list[Future[torch.Tensor]]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            try:
                for step in steps:
                    places, views_PK = plan.rank_slice(step, self.rank, self.world_size)
                    futures = [pool.submit(self._read_place, p, v) for p, v in zip(places, views_PK, strict=True)]
                    waiting.append((places, views_PK, futures))
                    if len(waiting) > self.config.prefetch_batches:
                        yield self._finish(*waiting.popleft())
                while waiting:
                    yield self._finish(*waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, places: np.ndarray, views_PK: np.ndarray, futures: list[Future[torch.Tensor]]) -> PlaceBatch:
        return self._batch(places, views_PK, [future.result() for future in futures])

    def _batch(self, places: np.ndarray, views_PK: np.ndarray, images: list[torch.Tensor]) -> PlaceBatch:
        place_ids_B = torch.from_numpy(np.repeat(places, views_PK.shape[1]))
        return PlaceBatch(torch.cat(images), place_ids_B, torch.from_numpy(views_PK.reshape(-1).copy()))

    def _read_place(self, place: int, views_K: np.ndarray) -> torch.Tensor:
        """The planned views of a place, uint8 [K, 3, side, side]."""
        rows = self.index.rows(place)
        offsets, sizes = self.index.offset[rows], self.index.size[rows]
        first = int(offsets[0])
        length = int(offsets[-1] + sizes[-1]) - first
        data = os.pread(self._open(self.index.shard_path(place)), length, first)
        return torch.stack([self._decode_view(place, int(view), data, offsets - first, sizes) for view in views_K])

    def _decode_view(self, place: int, view: int, data: bytes, offsets: np.ndarray, sizes: np.ndarray) -> torch.Tensor:
        crcs = self.index.crc32[self.index.rows(place)]
        for turn in range(len(sizes)):
            candidate = (view + turn) % len(sizes)
            jpeg = data[offsets[candidate] : offsets[candidate] + sizes[candidate]]
            if zlib.crc32(jpeg) != crcs[candidate]:
                self._note(place, candidate, "its bytes differ from the index's crc32")
                continue
            try:
                return decode(jpeg, self.config.image_size)
            except ValueError as error:
                self._note(place, candidate, str(error))
        raise TooManyBadImagesError(
            f"{self.index.shard_path(place)}: place {place} has no readable image left; run `rerankvpr verify`"
        )

    def _open(self, shard: Path) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(shard, os.O_RDONLY)
        return self._files[shard]

    def _note(self, place: int, view: int, reason: str) -> None:
        if (place, view) in self.bad_images:
            return
        self.bad_images[place, view] = reason
        where = f"{self.index.shard_path(place)}: place {place} view {view}"
        print(f"rerankvpr: rank {self.rank}: {where}: {reason}; another view takes its place", file=sys.stderr)
        if len(self.bad_images) > self.config.max_bad_images:
            raise TooManyBadImagesError(
                f"{where}: {reason}; this is more than data.max_bad_images {self.config.max_bad_images} bad images "
                "on a rank; run `rerankvpr verify`"
            )
