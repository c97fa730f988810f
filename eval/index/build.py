"""An index is built, or grows by a part: over ranks, resumable, seen by readers once it is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.files import replacing
from configs.plugins import keep, plugins_of_network
from configs.progress import OnProgress, untold
from configs.ranks import barrier, from_rank_0, on_all_ranks
from configs.reading import reading
from configs.schema import EvalConfig
from configs.tensors import save_tensors
from eval.describer import Describer
from eval.evaluate import STORED_AS, precision_of
from eval.features import INDEX, FeatureError, StoredFeatures, digest, open_folder, weights_digest
from eval.index.approximate_files import check_params, fill, remove_other_kinds, train_once
from eval.index.encoding import ALL, Share, encode_shards, write_table
from eval.index.images import read_images
from eval.index.index import Index, shard_bounds_of
from eval.index.manifest import (
    NETWORK,
    PLUGINS,
    IndexFault,
    Manifest,
    Precision,
    check_plugins,
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
    share: Share | None = None  # of the shards, which is all that was made


def build_index(
    describer: Describer,
    photos: PhotoList,
    folder: Path,
    *,
    factory: str = "",
    params: str = "",
    share: Share | None = None,
    on_progress: OnProgress = untold,
) -> Built:
    """Encodes photographs on all ranks into a new index; what an interrupted build has whole is used again.

    `factory` is FAISS's string of an approximate index, such as IVF4096,PQ64, `params` how it is searched (nprobe=32);
    other `params` for an index that is there are written into it. With `share` (i, n) only every n-th shard of features
    from the i-th on is made, beside other tasks; a last call without it makes the rest. Raises IndexFault where the
    folder holds an index of other photographs, weights or settings.
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
        check_plugins(folder, manifest)
        _check_same(folder, manifest, weights, settings)
        made_with = (manifest.approximate or {}).get("factory", "")
        if made_with != factory:
            asked = f"--factory {made_with or 'none'}, asked for {factory or 'none'}"
            raise IndexFault(f"{folder} was made with {asked}; give another --out")
        if manifest.parts and _key_of_part(folder, manifest.parts[0]) == key:
            return _with_params(folder, manifest, params)
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
            keep(plugins_of_network(model), folder / PLUGINS)
    manifest = Manifest(
        images=0,
        parts=[],
        weights=weights,
        network=describer.network.model_copy(update={"weights": "random"}).model_dump(mode="json"),
        precision=precision_of_weights(model),
        settings=settings,
        approximate={"factory": factory, "params": params, "sha256": ""} if factory else None,
        plugins={plugin.name: plugin.sha256 for plugin in plugins_of_network(model)},
    )
    return _grow(model, config, photos, folder, manifest, key, 0, on_progress, share)


def add_to_index(
    model: PlaceModel,
    photos: PhotoList,
    folder: Path,
    *,
    share: Share | None = None,
    on_progress: OnProgress = untold,
) -> Built:
    """Encodes the photographs that the index does not have; those that it has by name and bytes are left alone.

    For `share` see `build_index`.
    """
    manifest = from_rank_0(lambda: read_manifest(folder))
    check_plugins(folder, manifest)
    weights = weights_digest(model)
    if weights != manifest.weights:
        raise IndexFault(other_weights(folder, manifest, weights))
    new = from_rank_0(lambda: _new_ones(folder, manifest, photos))
    known = len(photos) - len(new)
    if not new:
        return Built(folder, manifest.images, 0, known, [], was_complete=True)
    photos, config = photos.part(new), manifest.config()
    return _grow(model, config, photos, folder, manifest, key_of(model, config, photos), known, on_progress, share)


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


def precision_of_weights(model: PlaceModel) -> Precision:
    """fp32, bf16 or fp16."""
    names: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[model.dtype]


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


def _with_params(folder: Path, manifest: Manifest, params: str) -> Manifest:
    """The manifest of an index that is there, searched by `params` from here on. Raises ValueError for wrong ones."""
    asked = manifest.approximate
    if asked is None or asked["params"] == params:
        return manifest
    check_params(folder, asked["factory"], params, asked["sha256"])
    changed = replace(manifest, approximate={**asked, "params": params})
    write_manifest(folder, changed)
    return changed


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
    file = part_folder(folder, name) / INDEX
    with reading(file, "the description of features", IndexFault):
        return str(json.loads(file.read_text())["key"])


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
    share: Share | None,
) -> Built:
    name = f"{len(manifest.parts):06d}"
    here = part_folder(folder, name)
    with on_all_ranks():
        if dist.get_rank() == 0:
            _begin_part(here, key, len(photos), alone=share is None)
    encoded = encode_shards(model, config, photos, here, key, on_progress, share or ALL)
    if share is not None:
        return Built(folder, manifest.images, encoded, known, [], share=share)

    part = from_rank_0(lambda: write_table(photos, here, config))
    if manifest.approximate is not None:
        features = StoredFeatures(here, shard_bounds_of(part.counts))
        asked = manifest.approximate
        with on_all_ranks():
            if dist.get_rank() == 0 and not manifest.parts:
                remove_other_kinds(folder, here, asked["factory"])
        trained, sha256 = train_once(folder, asked["factory"], asked["params"], features, asked["sha256"])
        part = replace(part, approximate=fill(here, asked["factory"], trained, features))
        manifest = replace(manifest, approximate={**asked, "sha256": sha256})
    with on_all_ranks():
        if dist.get_rank() == 0:
            write_part(folder, name, part)
    grown = replace(manifest, images=manifest.images + part.images, parts=[*manifest.parts, name])
    barrier()
    index = Index(folder, grown, network=model)
    verdict = learn(index.features, index.images.positions, config.rerank, model.device)
    grown = replace(grown, verdict=None if verdict is None else asdict(verdict))
    from_rank_0(lambda: write_manifest(folder, grown))
    return Built(folder, grown.images, part.images, known, part.left_out, notes=photos.notes)


def _begin_part(here: Path, key: str, count: int, *, alone: bool) -> None:
    """Makes the folder of a part; one that an interrupted addition of other photographs has left is removed.

    Not `alone`, as one of several tasks, nothing is removed: raises IndexFault instead.
    """
    about = {"key": key, "images": count}
    try:
        open_folder(here, about)
    except FeatureError as error:
        if not alone:
            raise IndexFault(
                f"{here}: left by an addition of other photographs, weights or settings; run once without --part, "
                f"which removes it, or remove {here}"
            ) from error
        shutil.rmtree(here)
        if not exists(here.parent.parent):
            for file in here.parent.parent.glob("trained-*.faiss"):
                file.unlink()
        open_folder(here, about)
