"""Features on disk: memory-mapped shards of images with an index, each shard whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from configs.files import replacing, write_whole
from configs.plugins import digests_of_network
from configs.reading import reading, shown
from configs.tensors import save_tensors
from eval.feature_digest import LOCAL, SUMS, image_sum, image_sums, shard_digest
from eval.scratch import is_seen

MAX_SHARD_IMAGES = 1024  # at 400 kB an image, half a gigabyte in memory while it is made
SHARDS_WANTED = 64  # so that many ranks have work, and an interrupted run loses little
_WHOLE = "a whole shard of features"
INDEX = "index.json"
UNREADABLE = "unreadable"
DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8, "I64": np.int64, "F64": np.float64}


class FeatureError(ValueError):
    """Stored features that are damaged or belong to something else; one line naming the file."""


@dataclass(frozen=True)
class Patches:
    """Local features of a few images, padded to the largest count; padding is zero."""

    codes_BMC: torch.Tensor  # float32
    count_B: torch.Tensor  # int64
    cell_BM2: torch.Tensor  # int64
    saliency_BM: torch.Tensor  # float32; -1 in the padding


def shard_bounds(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """First and past-the-last image of each shard: a matter of the images and the batch alone, not of the ranks."""
    size = -(-num_images // SHARDS_WANTED)
    size = min(MAX_SHARD_IMAGES, -(-size // batch_size) * batch_size)
    size = max(size, batch_size)
    return [(first, min(first + size, num_images)) for first in range(0, num_images, size)]


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / f"features-{number:06d}.safetensors"


def digest(content: Any) -> str:
    """SHA-256 of something JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of parameters and buffers, and the code of plug-ins that use them."""
    sha = hashlib.sha256()
    if of_plugins := digests_of_network(model):
        sha.update(json.dumps([type(getattr(model, "aggregator", model)).__qualname__, of_plugins]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def files_digest(paths: list[Path]) -> str:
    """SHA-256 over names, sizes and times of files. Raises FileNotFoundError naming a file that is not there."""
    sha = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        sha.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def is_extraction(folder: Path) -> bool:
    """Whether an extraction into this folder was begun."""
    return (folder / INDEX).is_file()


def open_folder(folder: Path, about: dict[str, Any]) -> None:
    """Makes the folder of one extraction, or checks that an existing one is of the same.

    `about` says what the features are of: weights, preprocessing, images. Raises FeatureError naming what differs.
    """
    file = folder / INDEX
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        with reading(file, f"the description of features; remove {folder} and they are made again", FeatureError):
            stored: dict[str, Any] = dict(json.loads(file.read_text()).items())
        differing = sorted(key for key in {*stored, *about} if stored.get(key) != about.get(key))
        if differing:
            key = differing[0]
            raise FeatureError(
                f"{folder} holds features of other {key} ({stored.get(key)!s:.40}, asked for {about.get(key)!s:.40}); "
                "give another --features or remove that folder"
            )
        return
    write_whole(file, json.dumps(about, indent=1, default=str))


def write_shard(
    path: Path, tensors: dict[str, torch.Tensor], key: str, unreadable: Mapping[int, str] | None = None
) -> None:
    """A shard of features with its digests; it appears whole or not at all.

    `unreadable` says why some of its rows are of no image: their descriptors are zeros, they have no patches.
    """
    arrays = {name: t.contiguous().cpu() for name, t in tensors.items()}
    if "codes" in arrays:
        arrays[SUMS] = torch.from_numpy(image_sums({name: t.numpy() for name, t in arrays.items()}))
    metadata = {"key": key, "digest": shard_digest({name: t.numpy() for name, t in arrays.items()})}
    if unreadable:
        metadata[UNREADABLE] = json.dumps({str(row): why for row, why in sorted(unreadable.items())})
    with replacing(path) as partial:
        save_tensors(arrays, partial, metadata=metadata)


def unreadable_in(path: Path, metadata: Mapping[str, str], num_images: int) -> dict[int, str]:
    """Rows of a shard that are of no image, with the reason. Raises FeatureError if that is damaged."""
    if UNREADABLE not in metadata:
        return {}
    if not path.is_file():
        raise FeatureError(f"feature shard {path} is a pipe, socket or device; remove it and it is made again")
    with reading(f"feature shard {path}", f"{_WHOLE}; remove it and it is made again", FeatureError):
        rows = {int(row): shown(why) for row, why in dict(json.loads(metadata[UNREADABLE])).items()}
        if not all(0 <= row < num_images for row in rows):
            raise ValueError(f"unreadable rows {sorted(rows)} of {num_images} images")
    return rows


def shard_is_whole(path: Path, key: str, num_images: int) -> bool:
    """Whether a shard of this extraction is there. Raises FeatureError where another one's, or a damaged one, is.

    All that a search reads is held against its digest; local features are when they are read, see `StoredFeatures`.
    """
    if not path.is_file():
        return False
    arrays, metadata = map_shard(path)
    if metadata.get("key") != key or len(arrays["descriptors"]) != num_images:
        raise FeatureError(f"feature shard {path} is of other weights, preprocessing or images; remove it")
    check_shard(path, arrays, metadata)
    return True


def check_shard(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Raises FeatureError if a shard's descriptors, patch counts or checksums differ from its digest."""
    if metadata.get("digest") != shard_digest(arrays):
        what = "its descriptors differ from their digest" if "digest" in metadata else "it has no digest"
        raise FeatureError(f"feature shard {path} is damaged ({what}); remove it and it is made again")


class StoredFeatures:
    """Features of a list of images, read from their shards as they are needed.

    What is read first is held against its digest then: a shard's descriptors, an image's local features. Raises
    FeatureError naming file and image.
    """

    def __init__(self, folder: Path, bounds: list[tuple[int, int]]) -> None:
        self.folder = folder
        self.paths = [shard_path(folder, number) for number in range(len(bounds))]
        mapped = [map_shard(path, stop - first) for path, (first, stop) in zip(self.paths, bounds, strict=True)]
        self._hold(bounds, [arrays for arrays, _ in mapped], [metadata for _, metadata in mapped])

    def _hold(
        self, bounds: list[tuple[int, int]], shards: list[dict[str, NDArray[Any]]], metadata: list[dict[str, str]]
    ) -> None:
        self.bounds, self.shards, self._metadata = bounds, shards, metadata
        self.starts = np.array([first for first, _ in bounds], dtype=np.int64)
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._checked_shards: set[int] = set()
        self._checked = np.zeros(len(self), dtype=bool)

    @classmethod
    def joined(cls, parts: Sequence[StoredFeatures]) -> StoredFeatures:
        """The images of several lists under one numbering, one list after another."""
        whole = cls.__new__(cls)
        whole.folder = parts[0].folder if parts else Path()
        whole.paths = [path for part in parts for path in part.paths]
        before = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        bounds = [(a + n, b + n) for n, part in zip(before, parts, strict=False) for a, b in part.bounds]
        whole._hold(bounds, [s for part in parts for s in part.shards], [m for part in parts for m in part._metadata])
        return whole

    @classmethod
    def in_memory(cls, arrays: dict[str, NDArray[Any]]) -> StoredFeatures:
        """Features that were just made, as the one shard of a list: nothing on disk, nothing to check."""
        made = cls.__new__(cls)
        made.folder, made.paths = Path(), [Path("features in memory")]
        made._hold([(0, len(arrays["descriptors"]))], [arrays], [{}])
        made._checked_shards.add(0)
        made._checked[:] = True
        return made

    def __len__(self) -> int:
        return self.bounds[-1][1] if self.bounds else 0

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """Images that could not be read, by number, with the reason; they have a descriptor of zeros, no patches."""
        return {
            first + row: why
            for path, said, (first, stop) in zip(self.paths, self._metadata, self.bounds, strict=True)
            for row, why in unreadable_in(path, said, stop - first).items()
        }

    @property
    def has_local(self) -> bool:
        """Whether local features were stored."""
        return bool(self.shards) and "codes" in self.shards[0]

    def offsets(self, number: int) -> NDArray[np.int64]:
        """First patch of each image of a shard, and the end of the last."""
        if number not in self._offsets:
            self._check_shard(number)
            count = np.asarray(self.shards[number]["count"], dtype=np.int64)
            self._offsets[number] = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
        return self._offsets[number]

    @cached_property
    def max_patches(self) -> int:
        """Patches of the image with most of them."""
        return max((int(shard["count"].max(initial=0)) for shard in self.shards), default=0)

    @property
    def channels(self) -> int:
        """C of the local features."""
        return int(self.shards[0]["codes"].shape[1])

    @property
    def bytes_per_image(self) -> float:
        """Mean bytes on disk of an image's descriptor and local features."""
        return sum(path.stat().st_size for path in self.paths) / max(1, len(self))

    @property
    def local_bytes_per_image(self) -> float:
        """Mean bytes of an image's local features."""
        total = sum(a.nbytes for shard in self.shards for name, a in shard.items() if name in LOCAL)
        return total / max(1, len(self))

    def _check_shard(self, number: int) -> None:
        if number not in self._checked_shards:
            check_shard(self.paths[number], self.shards[number], self._metadata[number])
            self._checked_shards.add(number)

    def _check_image(self, image: int, number: int) -> None:
        if self._checked[image]:
            return
        shard, row, offsets = self.shards[number], image - int(self.starts[number]), self.offsets(number)
        if image_sum(shard, int(offsets[row]), int(offsets[row + 1])) != shard[SUMS][row]:
            path = self.paths[number]
            raise FeatureError(
                f"feature shard {path} is damaged (local features of its image {row}); remove it and it is made again"
            )
        self._checked[image] = True

    def descriptors(self, first: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Global descriptors [stop - first, D] of a run of images."""
        stop = len(self) if stop is None else stop
        parts = []
        for number, (low, high) in enumerate(self.bounds):
            if low < stop and first < high:
                self._check_shard(number)
                parts.append(np.asarray(self.shards[number]["descriptors"][max(first - low, 0) : stop - low]))
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    def rows(self, images_X: NDArray[np.int64]) -> NDArray[np.float32]:
        """Global descriptors [X, D] of some images."""
        shard_X = np.searchsorted(self.starts, images_X, side="right") - 1
        size = int(self.shards[0]["descriptors"].shape[1]) if self.shards else 0
        rows_XD = np.empty((len(images_X), size), dtype=np.float32)
        for number in np.unique(shard_X).tolist():
            self._check_shard(number)
            here = shard_X == number
            rows_XD[here] = self.shards[number]["descriptors"][images_X[here] - self.starts[number]]
        return rows_XD

    def blocks(self, rank: int, world_size: int, block_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """First image and descriptors of the runs of shards that a rank searches, a bounded block at a time."""
        first, stop = len(self.shards) * rank // world_size, len(self.shards) * (rank + 1) // world_size
        start = first
        while start < stop:
            end, size = start, 0
            while end < stop and (end == start or size + self.shards[end]["descriptors"].nbytes <= block_bytes):
                size += self.shards[end]["descriptors"].nbytes
                end += 1
            yield self.bounds[start][0], self.descriptors(self.bounds[start][0], self.bounds[end - 1][1])
            start = end

    def patches(self, images: NDArray[np.int64], device: torch.device, width: int = 0) -> Patches:
        """Local features of some images, padded to the largest count among them, or to `width`."""
        shard_B = np.searchsorted(self.starts, images, side="right") - 1
        rows = [int(image - self.starts[s]) for image, s in zip(images, shard_B, strict=True)]
        spans = [
            (int(self.offsets(int(s))[r]), int(self.offsets(int(s))[r + 1])) for s, r in zip(shard_B, rows, strict=True)
        ]
        counts = [stop - first for first, stop in spans]
        width = max(width, *counts, 1)
        dtype = self.shards[0]["codes"].dtype
        codes_BMC = np.zeros((len(images), width, self.channels), dtype=dtype)
        scale_BM = np.zeros((len(images), width), dtype=np.float32)
        cell_BM2 = np.zeros((len(images), width, 2), dtype=np.int64)
        saliency_BM = np.full((len(images), width), -1.0, dtype=np.float32)
        for i, (s, (first, stop), count) in enumerate(zip(shard_B, spans, counts, strict=True)):
            self._check_image(int(images[i]), int(s))
            shard = self.shards[s]
            codes_BMC[i, :count] = shard["codes"][first:stop]
            scale_BM[i, :count] = shard["scale"][first:stop]
            cell_BM2[i, :count] = shard["cell"][first:stop]
            saliency_BM[i, :count] = shard["saliency"][first:stop]
        codes = torch.from_numpy(codes_BMC).to(device).float()
        if dtype == np.int8:
            codes *= torch.from_numpy(scale_BM).to(device)[:, :, None]
        return Patches(
            codes,
            torch.tensor(counts, device=device),
            torch.from_numpy(cell_BM2).to(device),
            torch.from_numpy(saliency_BM).to(device),
        )


def map_shard(path: Path, num_images: int | None = None) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a feature shard as read-only memory maps, and its metadata.

    Raises FeatureError if it is damaged: its header, or shapes that do not agree with each other and the images.
    """
    if not is_seen(path):
        raise FeatureError(f"feature shard {path} is not there; do all nodes see the folder of --features?")
    if not path.is_file():
        raise FeatureError(f"feature shard {path} is a pipe, socket or device; remove it and it is made again")
    with reading(f"feature shard {path}", f"{_WHOLE}; remove it and it is made again", FeatureError):
        with safe_open(path, framework="numpy") as file:  # checks the form of the header
            metadata = dict(file.metadata() or {})
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        file_X = np.asarray(np.memmap(path, np.uint8, "r"))  # one map a file: a process may hold some 65,000
        arrays = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                arrays[name] = file_X[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        _check_shapes(arrays, len(arrays["descriptors"]) if num_images is None else num_images)
    return arrays, metadata


def _check_shapes(arrays: dict[str, NDArray[Any]], num_images: int) -> None:
    """Raises ValueError or KeyError unless the arrays are those of a shard of `num_images`."""
    if arrays["descriptors"].ndim != 2 or len(arrays["descriptors"]) != num_images:
        raise ValueError(f"descriptors of shape {arrays['descriptors'].shape} for {num_images} images")
    if not {"codes", SUMS} & arrays.keys():
        return
    count = arrays["count"]
    if count.shape != (num_images,) or count.dtype != np.int64 or (count < 0).any():
        raise ValueError(f"patch counts of shape {count.shape} for {num_images} images, or below 0")
    patches, channels = int(count.sum()), arrays["codes"].shape[-1]
    expected = {
        SUMS: (num_images,),
        "codes": (patches, channels),
        "scale": (patches,),
        "cell": (patches, 2),
        "saliency": (patches,),
    }
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} of shape {arrays[name].shape}, expected {shape}")
