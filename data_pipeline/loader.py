"""Place batches: the rank's share of each global step of an epoch plan, as uint8 images."""

from __future__ import annotations

import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import DataConfig
from configs.secrets import without_secrets
from configs.traced import beside
from data_pipeline.augment import Drawn
from data_pipeline.cache import RangeCache
from data_pipeline.copies import CopyStream
from data_pipeline.images import decode_into, empty_batch
from data_pipeline.index import PlaceRange
from data_pipeline.nvjpeg import decode_on_gpu, empty_on_gpu, hand_over
from data_pipeline.plan import EpochPlan
from data_pipeline.storage import RangeReader, StorageError, is_remote
from data_pipeline.stream import Reading, StreamCounts, TarStreams

MB = 2**20
GB = 2**30


@dataclass(frozen=True)
class PlaceBatch:
    """A rank's share of a global step: B = P/W * K images, those of a place together."""

    images_B3HW: torch.Tensor  # uint8; on the GPU, or in pinned memory if there is one
    place_ids_B: torch.Tensor  # int64
    views_B: torch.Tensor  # int64
    place_ids_N: torch.Tensor | None = None  # int64, of the global step, in the order of ranks
    drawn: Drawn | None = None  # the augmentation of each image, if it was asked for
    views_N: torch.Tensor | None = None  # int64, of the global step, beside place_ids_N


Draw = Callable[[torch.Tensor, torch.Tensor], Drawn]  # of place ids and views


class TooManyBadImagesError(RuntimeError):
    """More unreadable images than data.max_bad_images."""


class Places(Protocol):
    """What a loader reads from: a shard set's index, or several sets as one."""

    def place_range(self, place_id: int) -> PlaceRange:
        """Where the views of a place lie."""


@dataclass
class _Step:
    """A step under way: its places are read, then decoded into their part of one tensor."""

    places: NDArray[np.int64]
    views_PK: NDArray[np.int64]
    ranges: list[PlaceRange]
    all_places: NDArray[np.int64]  # of the global step
    all_views_PK: NDArray[np.int64]
    draw: Draw | None = None
    drawn: Future[Drawn] | None = None
    reads: Sequence[Future[bytes] | Reading] = field(default_factory=list)
    images_B3HW: torch.Tensor | None = None
    copies: CopyStream | None = None
    on_its_way: torch.Tensor | None = None  # the images' copy on the GPU, if it has begun
    decoded: list[Future[None]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(place.length for place in self.ranges)

    def batch(self) -> PlaceBatch:
        for future in self.decoded:
            future.result()
        assert self.images_B3HW is not None
        images_B3HW = self.images_B3HW
        if self.copies:
            self.copy()
            assert self.on_its_way is not None
            images_B3HW = self.copies.hand_over(self.on_its_way)
        elif images_B3HW.is_cuda:
            hand_over(images_B3HW)
        place_ids_N = torch.from_numpy(np.repeat(self.all_places, self.views_PK.shape[1]))
        drawn = self.drawn.result() if self.drawn else self.draw_now() if self.draw else None
        views_N = torch.from_numpy(self.all_views_PK.reshape(-1))
        return PlaceBatch(images_B3HW, self.place_ids_B, self.views_B, place_ids_N, drawn, views_N)

    def copy_if_decoded(self) -> None:
        """Begins to copy the images to the GPU, if they are all there: nobody waits, and no error is raised here."""
        if self.copies and all(one.done() and not one.exception() for one in self.decoded):
            self.copy()

    def copy(self) -> None:
        """Begins to copy the images to the GPU, unless that has begun."""
        assert self.copies
        assert self.images_B3HW is not None
        if self.on_its_way is None:
            self.on_its_way = self.copies.begin(self.images_B3HW)

    @property
    def place_ids_B(self) -> torch.Tensor:
        return torch.from_numpy(np.repeat(self.places, self.views_PK.shape[1]))

    @property
    def views_B(self) -> torch.Tensor:
        return torch.from_numpy(self.views_PK.reshape(-1).copy())

    def draw_now(self) -> Drawn:
        assert self.draw is not None
        with beside("draw augmentation"):
            return self.draw(self.place_ids_B, self.views_B)


class PlaceLoader:
    """Reads places from tar shards, by a range read of each or whole tars in order, and decodes views in threads.

    Places are read ahead of the decoder up to data.read_ahead_mb, and steps decoded ahead of the caller up to
    data.prefetch_batches. With `copies` batches are given on the GPU: the next one, if it is decoded, is on its way
    there while the caller works on one. A view whose bytes differ from the index's crc32, or do not decode, is replaced
    by the next view of the same place, so the replacement depends on nothing but the plan; it is named on stderr once
    and counted, and more than data.max_bad_images of them on a rank stop the run.
    """

    def __init__(
        self,
        places: Places,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        reader: RangeReader | None = None,
        copies: CopyStream | None = None,
    ) -> None:
        self.places, self.config = places, config
        self.rank, self.world_size = rank, world_size
        self.bad_images: dict[tuple[int, int], str] = {}
        self.reader = reader or build_reader(config, rank=rank)
        if config.decode == "nvjpeg" and not torch.cuda.is_available():
            raise ValueError("data.decode nvjpeg needs an NVIDIA GPU, and torch sees none; use cpu")
        self._gpu = torch.device("cuda", torch.cuda.current_device()) if config.decode == "nvjpeg" else None
        self._copies = copies if self._gpu is None else None
        self._pinned = self._gpu is None and (torch.cuda.is_available() or copies is not None)
        self._lock = threading.Lock()
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._lanes: list[ThreadPoolExecutor] = []
        self.streamed = StreamCounts()

    @property
    def num_bad_images(self) -> int:
        """Distinct unreadable images met on this rank."""
        return len(self.bad_images)

    def batches(self, plan: EpochPlan, steps: Iterable[int], draw: Draw | None = None) -> Iterator[PlaceBatch]:
        """This rank's share of the given steps of an epoch, decoded ahead of the caller; `draw` runs ahead too."""
        stop = threading.Event()
        streams = None
        if plan.reading_LM is not None:
            steps = list(steps)
            streams = self._open_streams(plan, steps, stop)
        if self.config.decode_threads == 0:
            for number in steps:
                step = self._plan_step(plan, number, draw)
                images_PK3HW = self._empty(step)
                step.reads = streams.start(step.places) if streams else []
                for place, out in enumerate(images_PK3HW):
                    data = step.reads[place].result() if streams else self._read(step.ranges[place])
                    self._decode_place(step, place, data, out)
                yield step.batch()
            return
        if self._pools is None:  # kept from epoch to epoch: threads that come and go fragment the memory
            self._pools = (
                ThreadPoolExecutor(self.config.read_threads, thread_name_prefix="read"),
                ThreadPoolExecutor(self.config.decode_threads, thread_name_prefix="decode"),
            )
        reading: deque[_Step] = deque()
        decoding: deque[_Step] = deque()
        try:
            yield from self._ahead(plan, iter(steps), draw, reading, decoding, *self._pools, stop, streams)
        finally:
            stop.set()
            for step in (*reading, *decoding):
                for read in step.reads:
                    read.cancel()
                for ahead in (*step.decoded, step.drawn):
                    if ahead:
                        ahead.cancel()

    def _ahead(
        self,
        plan: EpochPlan,
        numbers: Iterator[int],
        draw: Draw | None,
        reading: deque[_Step],
        decoding: deque[_Step],
        readers: ThreadPoolExecutor,
        decoders: ThreadPoolExecutor,
        stop: threading.Event,
        streams: TarStreams | None,
    ) -> Iterator[PlaceBatch]:
        held = 0
        while True:
            while held < self.config.read_ahead_mb * MB or len(reading) + len(decoding) <= self.config.prefetch_batches:
                number = next(numbers, None)
                if number is None:
                    break
                step = self._plan_step(plan, number, draw)
                if streams:
                    step.reads = streams.start(step.places)
                else:
                    step.reads = [readers.submit(self._read, planned, stop) for planned in step.ranges]
                held += step.num_bytes
                reading.append(step)
            while reading and len(decoding) <= self.config.prefetch_batches:
                step = reading.popleft()
                self._start_decoding(step, decoders)
                decoding.append(step)
            if not decoding:
                return
            step = decoding.popleft()
            batch = step.batch()
            held -= step.num_bytes
            del step
            if decoding:
                decoding[0].copy_if_decoded()
            yield batch

    def _start_decoding(self, step: _Step, decoders: ThreadPoolExecutor) -> None:
        def decode_one(number: int, out_K3HW: torch.Tensor) -> None:
            data = step.reads[number].result()
            with beside("decode a place"):
                self._decode_place(step, number, data, out_K3HW)

        step.drawn = decoders.submit(step.draw_now) if step.draw else None
        step.decoded = [decoders.submit(decode_one, number, out) for number, out in enumerate(self._empty(step))]

    def _plan_step(self, plan: EpochPlan, number: int, draw: Draw | None) -> _Step:
        all_places, all_views_PK = plan.rank_slice(number, 0, 1)
        own = plan.rank_part(self.rank, self.world_size)
        ranges = [self.places.place_range(int(place)) for place in all_places[own]]
        return _Step(all_places[own], all_views_PK[own], ranges, all_places, all_views_PK, draw)

    def _empty(self, step: _Step) -> torch.Tensor:
        """The step's batch to be filled, as [P, K, 3, H, W]."""
        size, shape_PK = self.config.image_size, step.views_PK.shape
        if self._gpu:
            step.images_B3HW = empty_on_gpu(step.views_PK.size, size, self._gpu)
        else:
            step.images_B3HW = empty_batch(step.views_PK.size, size, pin_memory=self._pinned)
            step.copies = self._copies
        return step.images_B3HW.unflatten(0, shape_PK)

    def _read(self, place: PlaceRange, stop: threading.Event | None = None) -> bytes:
        """The bytes of a place; where they came over a network and differ from the index, once more from the source."""
        with beside("read a place"):
            data = self.reader.read(place.location, place.start, place.length, version=place.version, stop=stop)
        if is_remote(place.location) and not all(_is_whole(place, data, view) for view in range(len(place.sizes))):
            data = self.reader.read(
                place.location, place.start, place.length, version=place.version, fresh=True, stop=stop
            )
        return data

    def _open_streams(self, plan: EpochPlan, steps: list[int], stop: threading.Event) -> TarStreams:
        assert plan.reading_LM is not None
        while len(self._lanes) < len(plan.reading_LM):
            self._lanes.append(ThreadPoolExecutor(1, thread_name_prefix="lane"))
        return TarStreams(
            self.places,
            plan,
            steps,
            rank=self.rank,
            world_size=self.world_size,
            reader=self.reader,
            threads=self._lanes,
            stop=stop,
            counts=self.streamed,
        )

    def _asked_for_alone(self, place: PlaceRange, streamed: bytes) -> bytes:
        """A place that its stream gave damaged, read by its range: what follows a damaged header may be whole."""
        try:
            return self._read(place)
        except StorageError:  # such as of a server that knows no ranges
            return streamed

    def _decode_place(self, step: _Step, number: int, data: bytes, out_K3HW: torch.Tensor) -> None:
        """Decodes the planned views of the step's place of that number into `out`, uint8 [K, 3, H, W]."""
        place, planned, views = int(step.places[number]), step.ranges[number], step.views_PK[number].tolist()
        if self.config.access == "stream" and not all(_is_whole(planned, data, view) for view in views):
            data = self._asked_for_alone(planned, data)
        if not out_K3HW.is_cuda:
            for view, out in zip(views, out_K3HW, strict=True):
                self._decode_view(place, planned, view, data, out)
        elif not self._decoded_on_gpu(planned, views, data, out_K3HW):
            on_cpu_K3HW = empty_batch(len(views), self.config.image_size)
            for view, out in zip(views, on_cpu_K3HW, strict=True):
                self._decode_view(place, planned, view, data, out)
            out_K3HW.copy_(on_cpu_K3HW)

    def _decoded_on_gpu(self, planned: PlaceRange, views: list[int], data: bytes, out_K3HW: torch.Tensor) -> bool:
        """Whether the GPU decoded all views; where one is bad, the decoder of the CPU finds out which."""
        if not all(_is_whole(planned, data, view) for view in views):
            return False
        try:
            decode_on_gpu(out_K3HW, [_jpeg(planned, data, view) for view in views], self.config.interpolation)
        except ValueError:
            return False
        return True

    def _decode_view(self, place: int, planned: PlaceRange, view: int, data: bytes, out: torch.Tensor) -> None:
        num_views = len(planned.sizes)
        for candidate in (*range(view, num_views), *range(view)):
            if not _is_whole(planned, data, candidate):
                self._note(place, planned, candidate, "its bytes differ from the index's crc32")
                continue
            try:
                decode_into(out, _jpeg(planned, data, candidate), self.config.interpolation)
            except ValueError as error:
                self._note(place, planned, candidate, str(error))
            else:
                return
        raise TooManyBadImagesError(
            f"{without_secrets(planned.location, is_address=True)}: place {place} has no readable image left; run "
            "`rerankvpr verify`"
        )

    def _note(self, place: int, planned: PlaceRange, view: int, reason: str) -> None:
        with self._lock:
            if (place, view) in self.bad_images:
                return
            self.bad_images[place, view] = reason
            count = len(self.bad_images)
        where = f"{without_secrets(planned.location, is_address=True)}: place {place} view {view}"
        print(f"rerankvpr: rank {self.rank}: {where}: {reason}; another view takes its place", file=sys.stderr)
        if count > self.config.max_bad_images:
            raise TooManyBadImagesError(
                f"{where}: {reason}; this is more than data.max_bad_images {self.config.max_bad_images} bad images "
                "on a rank; run `rerankvpr verify`"
            )


def build_reader(config: DataConfig, *, rank: int = 0) -> RangeReader:
    """The reader that a recipe asks for, with its cache; outages are told on stderr."""
    cache = RangeCache(config.cache, int(config.cache_gb * GB)) if config.cache else None
    return RangeReader(
        retry_s=config.remote_retry_s,
        cache=cache,
        on_retry=lambda text: print(f"rerankvpr: rank {rank}: {text}", file=sys.stderr),
    )


def _jpeg(place: PlaceRange, data: bytes, view: int) -> bytes:
    return data[place.offsets[view] : place.offsets[view] + place.sizes[view]]


def _is_whole(place: PlaceRange, data: bytes, view: int) -> bool:
    return zlib.crc32(_jpeg(place, data, view)) == place.crc32[view]
