"""A part of an index is encoded: feature shards by all ranks, and by all tasks of an array, then its table."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configs.progress import OnProgress, PartOf
from configs.ranks import on_all_ranks
from configs.reading import is_out_of_memory
from configs.schema import EvalConfig
from data_pipeline.images import UnreadableImageError
from data_pipeline.index import BadImage
from data_pipeline.positions import Positions, from_lat_lon
from data_pipeline.tar_writer import BadImages
from eval.encode import encode, image_batches, pixels, shard_of
from eval.features import check_shard, map_shard, shard_bounds, shard_path, write_shard
from eval.index.images import Images, write_images
from eval.index.manifest import Part
from eval.index.photo_list import PhotoList
from model.network import PlaceModel

Share = tuple[int, int]  # i of n, from 0: every n-th shard from the i-th on
ALL: Share = (0, 1)


def encode_shards(
    model: PlaceModel,
    config: EvalConfig,
    photos: PhotoList,
    here: Path,
    key: str,
    on_progress: OnProgress,
    share: Share = ALL,
) -> int:
    """Writes the shards of a share that are not there, its shards dealt out to ranks; the photographs of the share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = shard_bounds(len(photos), config.batch_size)
    numbers = range(share[0], len(bounds), share[1])
    total = sum(bounds[number][1] - bounds[number][0] for number in numbers)
    done = 0
    for turn in range(0, len(numbers), world):
        with on_all_ranks():
            if turn + rank < len(numbers):
                number = numbers[turn + rank]
                first, stop = bounds[number]
                path = shard_path(here, number)
                if not _is_whole(path, key):
                    told = PartOf(on_progress, total, "photographs", done * world, each=world)
                    write_shard(path, _encode_shard(model, config, photos, first, stop, told), key)
                done += stop - first
        on_progress(min(total, done * world), total, "photographs")
    return total


def _is_whole(path: Path, key: str) -> bool:
    if not path.is_file():
        return False
    arrays, metadata = map_shard(path)
    if metadata.get("key") != key:
        return False
    check_shard(path, arrays, metadata)
    return True


@torch.inference_mode()
def _encode_shard(
    model: PlaceModel, config: EvalConfig, photos: PhotoList, first: int, stop: int, on_progress: OnProgress
) -> dict[str, torch.Tensor]:
    """Features of the photographs [first, stop) that can be read, their numbers, and what was learned of the files."""
    digests = np.zeros((stop - first, 32), dtype=np.uint8)
    camera = np.full((stop - first, 3), np.nan)
    size = np.zeros(stop - first, dtype=np.int64)
    known = photos.positions.known[first:stop]

    def load(i: int) -> torch.Tensor:
        data = photos.read(first + i)
        image = pixels(data, config, model.spec.patch, photos.names[first + i])
        digests[i] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        size[i] = len(data)
        if photos.camera is not None:
            camera[i] = _camera(photos, first + i, wanted=not known[i])
        return image

    def leave_out(_: int, error: UnreadableImageError | OSError) -> None:
        if is_out_of_memory(error):
            raise error

    batches = image_batches(stop - first, load, config, leave_out)
    found = encode(model, batches, config, lambda i: photos.names[first + i], on_progress=on_progress)
    kept = np.array(sorted(found), dtype=np.int64)
    return shard_of(model, found, kept.tolist(), config) | {
        "number": torch.from_numpy(kept + first),
        "sha256": torch.from_numpy(digests[kept]),
        "bytes": torch.from_numpy(size[kept]),
        "camera": torch.from_numpy(camera[kept]),
    }


def _camera(photos: PhotoList, number: int, *, wanted: bool) -> tuple[float, float, float]:
    """Latitude, longitude (if wanted) and time in seconds since 1970 of the camera's clock, NaN where unknown."""
    assert photos.camera is not None
    try:
        facts = photos.camera(number)
    except (ValueError, OSError):
        return np.nan, np.nan, np.nan
    time = np.nan if facts.taken is None else float(np.datetime64(facts.taken, "s").astype(np.int64))
    if not wanted or facts.lat is None or facts.lon is None:
        return np.nan, np.nan, time
    return facts.lat, facts.lon, time


def write_table(photos: PhotoList, here: Path, config: EvalConfig) -> Part:
    """Writes the table of a part whose shards are whole. Raises ValueError if too many photographs were left out."""
    bounds = shard_bounds(len(photos), config.batch_size)
    shards = [map_shard(shard_path(here, number))[0] for number in range(len(bounds))]
    kept = np.concatenate([np.zeros(0, np.int64), *(shard["number"] for shard in shards)])
    camera = np.concatenate([np.zeros((0, 3)), *(shard["camera"] for shard in shards)])
    left_out = [[photos.names[i], _fault(photos, i)] for i in np.setdiff1d(np.arange(len(photos)), kept)]
    BadImages(config.max_bad, len(photos)).check([BadImage("", 0, name, why) for name, why in left_out])
    when = camera[:, 2]
    times = np.full(len(kept), "NaT", dtype="datetime64[s]")
    times[np.isfinite(when)] = when[np.isfinite(when)].astype(np.int64).astype("datetime64[s]")
    if photos.when is not None:
        times = photos.when[kept]
    images = Images(
        [photos.names[i] for i in kept],
        _positions(photos.part(kept.tolist()).positions, camera),
        times,
        np.concatenate([np.zeros(0, np.int64), *(shard["bytes"] for shard in shards)]),
        np.concatenate([np.zeros((0, 32), np.uint8), *(shard["sha256"] for shard in shards)]),
    )
    write_images(here, images)
    counts = [len(shard["descriptors"]) for shard in shards]
    return Part(len(kept), counts, photos.root, images.positions.in_metres, left_out, list(photos.notes))


def _positions(given: Positions, camera_N3: np.ndarray) -> Positions:
    """The positions given, or those of the cameras where none are."""
    if given.known.any() or not np.isfinite(camera_N3[:, 0]).any():
        return given
    return from_lat_lon(camera_N3[:, 0], camera_N3[:, 1], "EXIF", missing_ok=True)


def _fault(photos: PhotoList, number: int) -> str:
    try:
        data = photos.read(number)
        if not data:
            return "empty file"
        from data_pipeline.photographs import decode_rgb

        decode_rgb(data)
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0]
    return "it could not be read when the others were"
