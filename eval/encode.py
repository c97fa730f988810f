"""Photographs through the network, in batches of one size; those that cannot be read are left out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from configs.image_size import height_width
from configs.progress import OnProgress, untold
from configs.reading import reason
from configs.schema import EvalConfig
from data_pipeline.images import UnreadableImageError
from eval.forward import encode_images
from eval.given_images import GivenImage, pixels_of
from eval.pixels import input_size
from model.network import PlaceModel

Load = Callable[[int], torch.Tensor]  # photograph of a number as uint8 [3, H, W]
OnUnreadable = Callable[[int, "UnreadableImageError | OSError"], None]
Batches = Iterator[tuple[list[int], torch.Tensor]]
Features = tuple[torch.Tensor, ...]  # descriptor [D]; with local features codes, scale, cell and saliency of patches


def image_batches(count: int, load: Load, config: EvalConfig, on_unreadable: OnUnreadable) -> Batches:
    """Batches of images of one size with their numbers, read two batches ahead.

    Images of one size are collected over the whole list, so few batches are short. One that cannot be read is left out
    and handed to `on_unreadable`.
    """
    with ThreadPoolExecutor(config.decode_threads, thread_name_prefix="read") as pool:
        waiting: deque[tuple[int, Future[torch.Tensor]]] = deque()
        buckets: dict[torch.Size, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        upcoming = iter(range(count))
        try:
            while True:
                while len(waiting) < 3 * config.batch_size and (number := next(upcoming, None)) is not None:
                    waiting.append((number, pool.submit(load, number)))
                if not waiting:
                    break
                number, future = waiting.popleft()
                try:
                    image = future.result()
                except (UnreadableImageError, OSError) as error:
                    on_unreadable(number, error)
                    continue
                bucket = buckets[image.shape]
                bucket.append((number, image))
                if len(bucket) == config.batch_size:
                    yield [n for n, _ in bucket], torch.stack([x for _, x in bucket])
                    bucket.clear()
            for bucket in buckets.values():
                if bucket:
                    yield [n for n, _ in bucket], torch.stack([x for _, x in bucket])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pixels(given: GivenImage, config: EvalConfig, patch: int, name: str) -> torch.Tensor:
    """An image as uint8 [3, H, W] by the rule of `config`. Raises UnreadableImageError naming it, or OSError."""
    try:
        return pixels_of(given, config, patch, name).image_3HW
    except ValueError as error:
        raise UnreadableImageError(Path(name), reason(error.__cause__ or error)) from error


def encode(
    model: PlaceModel,
    batches: Batches,
    config: EvalConfig,
    name_of: Callable[[int], object],
    projection_CK: torch.Tensor | None = None,
    on_progress: OnProgress = untold,
) -> dict[int, Features]:
    """Features of the images of all batches, by number; see `shard_of`.

    Raises ValueError with the image's name where a descriptor is not finite.
    """
    found: dict[int, Features] = {}
    for numbers, images_B3HW in batches:
        encoded = encode_images(model, images_B3HW, config, projection_CK)
        finite_B = encoded.descriptor_BD.isfinite().all(dim=1).cpu()
        if not finite_B.all():
            broken = name_of(numbers[int(finite_B.int().argmin())])
            raise ValueError(f"{broken}: the descriptor is not finite; are the weights?")
        columns: list[Sequence[torch.Tensor]] = [list(encoded.descriptor_BD.float().cpu())]
        if kept := encoded.local:
            sizes = kept.count_I.tolist()
            columns += [t.cpu().split(sizes) for t in (kept.codes_PC, kept.scale_P, kept.cell_P2, kept.saliency_P)]
        found |= dict(zip(numbers, zip(*columns, strict=True), strict=True))
        on_progress(len(found))
    return found


def shard_of(
    model: PlaceModel,
    found: Mapping[int, Features],
    numbers: Sequence[int],
    config: EvalConfig,
    projection_CK: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a shard of some images; one that was not found has a descriptor of zeros and no patches."""
    nothing: Features = ()
    if not numbers or any(number not in found for number in numbers):
        nothing = _nothing(model, config, projection_CK)
    rows = [found.get(number, nothing) for number in numbers]
    tensors = {"descriptors": torch.stack([row[0] for row in rows]) if rows else nothing[0][None][:0]}
    if config.rerank.enabled:
        tensors["count"] = torch.tensor([len(row[1]) for row in rows], dtype=torch.int64)
        for place, name in enumerate(("codes", "scale", "cell", "saliency"), 1):
            tensors[name] = torch.cat([row[place] for row in rows or [nothing]])
    return tensors


def _nothing(model: PlaceModel, config: EvalConfig, projection_CK: torch.Tensor | None) -> Features:
    """The features of an image that has none, of the types and channels that others have."""
    descriptor = torch.zeros(model.descriptor_size)
    if not config.rerank.enabled:
        return (descriptor,)
    sides = input_size(*height_width(config.image_size), config, model.spec.patch)
    kept = encode_images(model, torch.zeros(1, 3, *sides, dtype=torch.uint8), config, projection_CK).local
    assert kept is not None
    return descriptor, *(t[:0].cpu() for t in (kept.codes_PC, kept.scale_P, kept.cell_P2, kept.saliency_P))
