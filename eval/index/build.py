"""An index is built, or grows by a part: over ranks, resumable, seen by readers once it is whole."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.files import replacing
from configs.progress import OnProgress, PartOf, untold
from configs.ranks import from_rank_0, on_all_ranks
from configs.reading import is_out_of_memory
from configs.schema import EvalConfig
from configs.tensors import save_tensors
from data_pipeline.images import UnreadableImageError
from data_pipeline.index import BadImage
from data_pipeline.positions import Positions, from_lat_lon
from data_pipeline.tar_writer import BadImages
from eval.describer import Describer
from eval.encode import encode, image_batches, pixels, shard_of
from eval.evaluate import STORED_AS, precision_of
from eval.features import (
    FeatureError,
    StoredFeatures,
    check_shard,
    digest,
    map_shard,
    open_folder,
    shard_bounds,
    shard_path,
    weights_digest,
    write_shard,
)
from eval.index.approximate_files import fill, train_once
from eval.index.images import Images, read_images, write_images
from eval.index.index import Index, shard_bounds_of
from eval.index.manifest import (
    NETWORK,
    IndexFault,
    Manifest,
    Part,
    exists,
    part_folder,
    read_manifest,
    read_part,
    settings_of,
    write_manifest,
    write_part,
)
from eval.index.photo_list import PhotoList
from eval.index.verdict import learn
from eval.pixels import interpolation_of
from model.network import PlaceModel


@dataclass(frozen=True)
class Built:
    """What a build or an addition came to."""

    folder: Path
    images: int  # of the index
    added: int
    known: int  # photographs that the index had before
    left_out: list[list[str]]  # name, reason
    was_complete: bool = False
    notes: tuple[str, ...] = ()


def build_index(
    describer: Describer,
    photos: PhotoList,
    folder: Path,
    *,
    factory: str = "",
    params: str = "",
    on_progress: OnProgress = untold,
) -> Built:
    """Encodes photographs on all ranks into a new index; what an interrupted build has whole is used again.

    `factory` is FAISS's string of an approximate index, such as IVF4096,PQ64, `params` how it is searched (nprobe=32).
    Raises IndexFault where the folder holds an index of other photographs, weights or settings.
    """
    model, config = describer.model, describer.config
    if describer.network is None:
        raise ValueError("a network without its recipe cannot be stored in an index; use one of `rerankvpr.load`")
    settings, key = settings_of(config), key_of(model, config, photos)
    weights = weights_digest(model)

    def begin() -> Manifest | None:
        if not exists(folder):
            return None
        manifest = read_manifest(folder)
        _check_same(folder, manifest, weights, settings)
        made_with = (manifest.approximate or {}).get("factory", "")
        if made_with != factory:
            asked = f"--factory {made_with or 'none'}, asked for {factory or 'none'}"
            raise IndexFault(f"{folder} was made with {asked}; give another --out")
        if manifest.parts and _key_of_part(folder, manifest.parts[0]) == key:
            return manifest
        raise IndexFault(
            f"{folder}: an index of other photographs ({manifest.images} of them); `rerankvpr index add {folder} DB` "
            "adds to it, or give another --out"
        )

    if complete := from_rank_0(begin):
        return Built(folder, complete.images, 0, len(photos), [], was_complete=True)
    with on_all_ranks():
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_network(folder / NETWORK, model)
    manifest = Manifest(
        images=0,
        parts=[],
        weights=weights,
        network=describer.network.model_copy(update={"weights": "random"}).model_dump(mode="json"),
        precision=precision_of_weights(model),
        settings=settings,
        approximate={"factory": factory, "params": params, "sha256": ""} if factory else None,
    )
    return _grow(model, config, photos, folder, manifest, key, 0, on_progress)


def add_to_index(model: PlaceModel, photos: PhotoList, folder: Path, *, on_progress: OnProgress = untold) -> Built:
    """Encodes the photographs that the index does not have; those that it has by name and bytes are left alone."""
    manifest = from_rank_0(lambda: read_manifest(folder))
    weights = weights_digest(model)
    if weights != manifest.weights:
        raise IndexFault(other_weights(folder, manifest, weights))
    new = from_rank_0(lambda: _new_ones(folder, manifest, photos))
    known = len(photos) - len(new)
    if not new:
        return Built(folder, manifest.images, 0, known, [], was_complete=True)
    photos, config = photos.part(new), manifest.config()
    return _grow(model, config, photos, folder, manifest, key_of(model, config, photos), known, on_progress)


def key_of(model: PlaceModel, config: EvalConfig, photos: PhotoList) -> str:
    """Digest of all that decides the features of some photographs: weights, preprocessing, files."""
    about = {
        "weights": weights_digest(model),
        "preprocessing": [config.image_size, config.resize, interpolation_of(config), precision_of(model, config)],
        "batch": config.batch_size,
        "local": config.rerank.model_dump(include=STORED_AS) if config.rerank.enabled else None,
        "images": photos.identity,
    }
    return digest(about)


def precision_of_weights(model: PlaceModel) -> str:
    """fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]


def write_network(file: Path, model: PlaceModel) -> None:
    """All tensors of a network as one file, by its own keys."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(file, durable=True) as partial:
        save_tensors(state, partial)


def other_weights(folder: Path, manifest: Manifest, weights: str) -> str:
    """What to say where an index was made with other weights."""
    return (
        f"{folder} was made with other weights (digest {manifest.weights[:12]}, given {weights[:12]}); leave "
        "--checkpoint out to use the index's own, or build another index"
    )


def _check_same(folder: Path, manifest: Manifest, weights: str, settings: dict[str, Any]) -> None:
    if manifest.weights != weights:
        raise IndexFault(other_weights(folder, manifest, weights))
    differing = sorted(key for key in settings if manifest.settings.get(key) != settings[key])
    if not differing:
        return
    key, ours, theirs = differing[0], manifest.settings.get(differing[0]), settings[differing[0]]
    if isinstance(ours, dict):
        inner = next(name for name in theirs if ours.get(name) != theirs[name])
        key, ours, theirs = f"{key}.{inner}", ours.get(inner), theirs[inner]
    raise IndexFault(f"{folder} was made with {key} {ours}, asked for {theirs}; give another --out")


def _key_of_part(folder: Path, name: str) -> str:
    import json

    return str(json.loads((part_folder(folder, name) / "index.json").read_text())["key"])


def _new_ones(folder: Path, manifest: Manifest, photos: PhotoList) -> list[int]:
    """Numbers of the photographs whose name and bytes the index does not have."""
    have: dict[str, set[bytes]] = {}
    for name in manifest.parts:
        part = read_part(folder, name)
        table = read_images(part_folder(folder, name), part.images, in_metres=part.in_metres)
        for photo, sha256 in zip(table.names, table.sha256, strict=True):
            have.setdefault(photo, set()).add(sha256.tobytes())
    return [
        i
        for i, name in enumerate(photos.names)
        if name not in have or hashlib.sha256(photos.read(i)).digest() not in have[name]
    ]


def _grow(
    model: PlaceModel,
    config: EvalConfig,
    photos: PhotoList,
    folder: Path,
    manifest: Manifest,
    key: str,
    known: int,
    on_progress: OnProgress,
) -> Built:
    name = f"{len(manifest.parts):06d}"
    here = part_folder(folder, name)
    with on_all_ranks():
        if dist.get_rank() == 0:
            _begin_part(here, key, len(photos))
    part = _encode_part(model, config, photos, here, key, on_progress)

    if manifest.approximate is not None:
        features = StoredFeatures(here, shard_bounds_of(part.counts))
        asked = manifest.approximate
        trained, sha256 = train_once(folder, asked["factory"], asked["params"], features)
        part = replace(part, approximate=fill(here, asked["factory"], trained, features))
        manifest = replace(manifest, approximate={**asked, "sha256": sha256})
    with on_all_ranks():
        if dist.get_rank() == 0:
            write_part(folder, name, part)
    grown = replace(manifest, images=manifest.images + part.images, parts=[*manifest.parts, name])
    dist.barrier()
    index = Index(folder, grown, network=model)
    verdict = learn(index.features, index.images.positions, config.rerank, model.device)
    grown = replace(grown, verdict=None if verdict is None else asdict(verdict))
    from_rank_0(lambda: write_manifest(folder, grown))
    return Built(folder, grown.images, part.images, known, part.left_out, notes=photos.notes)


def _begin_part(here: Path, key: str, count: int) -> None:
    """Makes the folder of a part; one that an interrupted addition of other photographs has left is removed."""
    about = {"key": key, "images": count}
    try:
        open_folder(here, about)
    except FeatureError:
        shutil.rmtree(here)
        if not exists(here.parent.parent):
            for file in here.parent.parent.glob("trained-*.faiss"):
                file.unlink()
        open_folder(here, about)


def _encode_part(
    model: PlaceModel, config: EvalConfig, photos: PhotoList, here: Path, key: str, on_progress: OnProgress
) -> Part:
    """Features, then the table; every rank makes every world-size-th shard and returns what all of them are."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = shard_bounds(len(photos), config.batch_size)
    done = 0
    for turn in range(0, len(bounds), world):
        with on_all_ranks():
            if turn + rank < len(bounds):
                first, stop = bounds[turn + rank]
                path = shard_path(here, turn + rank)
                if not _is_whole(path, key):
                    told = PartOf(on_progress, len(photos), "photographs", done * world, each=world)
                    write_shard(path, _encode_shard(model, config, photos, first, stop, told), key)
                done += stop - first
        on_progress(min(len(photos), done * world), len(photos), "photographs")
    return from_rank_0(lambda: _finish_part(photos, here, bounds, config.max_bad))


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


def _finish_part(photos: PhotoList, here: Path, bounds: list[tuple[int, int]], max_bad: float) -> Part:
    """Writes the table of a part whose shards are whole. Raises ValueError if too many photographs were left out."""
    shards = [map_shard(shard_path(here, number))[0] for number in range(len(bounds))]
    kept = np.concatenate([np.zeros(0, np.int64), *(shard["number"] for shard in shards)])
    camera = np.concatenate([np.zeros((0, 3)), *(shard["camera"] for shard in shards)])
    left_out = [[photos.names[i], _fault(photos, i)] for i in np.setdiff1d(np.arange(len(photos)), kept)]
    BadImages(max_bad, len(photos)).check([BadImage("", 0, name, why) for name, why in left_out])
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
