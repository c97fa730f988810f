"""An index that is open: photographs in, candidates, positions and a verdict out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from configs.reading import reading, reason
from configs.schema import EvalConfig
from data_pipeline.images import UnreadableImageError
from eval.describer import Describer
from eval.encode import encode, image_batches, pixels, shard_of
from eval.features import StoredFeatures, weights_digest
from eval.given_images import GivenImage, GivenImages, as_list
from eval.index.approximate_files import Block, open_blocks, search_stored
from eval.index.estimate import distances, estimate, taken
from eval.index.images import Images, read_images
from eval.index.images import joined as joined_images
from eval.index.location import Candidate, Found, Location, nothing_found, stacked
from eval.index.manifest import (
    FILE,
    NETWORK,
    IndexFault,
    Manifest,
    Part,
    check_plugins,
    model_of,
    part_folder,
    read_manifest,
    read_part,
)
from eval.index.sequence import smooth
from eval.index.verdict import confidence
from eval.local_features import facet_reader
from eval.rerank import fuse, patch_counts, patch_mass, rerank, score_here
from eval.search import Rows, search_blocks
from model.lora import merge_lora
from model.materialise import materialise
from model.network import PlaceModel, meta_model
from model.weights import read_tensors

HELD_BYTES = 2 << 30  # descriptors up to so many are kept in memory between searches
BLOCK_BYTES = 256 << 20
BATCHES = 4  # of queries that are encoded, then searched, at a time

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Index:
    """A database of photographs, encoded once, and the network that it was encoded with. One thread at a time.

    `Index.open(folder)` maps the index; nothing is read before it is needed. It is the state of the moment: an index
    that grows meanwhile is seen after `refresh()`.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, network: PlaceModel | None = None, device: torch.device | None = None
    ) -> None:
        """Use `Index.open`."""
        self.folder, self.manifest = folder, manifest
        self.config: EvalConfig = manifest.config()
        self.device = device or (network.device if network else _device())
        self._network = network
        self.parts: list[Part] = [read_part(folder, name) for name in manifest.parts]
        if (counted := sum(part.images for part in self.parts)) != manifest.images:
            raise IndexFault(f"{folder / FILE}: {manifest.images} photographs, but {counted} in its parts")

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        network: PlaceModel | Describer | None = None,
        device: str | torch.device | None = None,
    ) -> Index:
        """The index in a folder, with its own network on `device` (the GPU where torch has one), or with `network`.

        `network` is what `rerankvpr.load` gives, or its model: it must have the weights that the index was made with.
        Raises IndexFault (a ValueError) in one line: no index there, not finished, damaged, made with other weights or
        plug-ins, or by a newer version.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        check_plugins(path, manifest)
        model = network.model if isinstance(network, Describer) else network
        if model is not None and (weights := weights_digest(model)) != manifest.weights:
            raise IndexFault(
                f"{path} was made with other weights (digest {manifest.weights[:12]}, given {weights[:12]}); leave the "
                "network out to use the index's own, or build another index"
            )
        return cls(path, manifest, network=model, device=None if device is None else torch.device(device))

    def __len__(self) -> int:
        return self.manifest.images

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, {len(self):,} photographs, {self.manifest.model().backbone})"

    def refresh(self) -> Index:
        """The index as it is by now: this one if it has not grown, else another one with the same network."""
        manifest = read_manifest(self.folder)
        return self if manifest == self.manifest else Index(self.folder, manifest, network=self._network)

    @cached_property
    def network(self) -> PlaceModel:
        """The network that the index was made with, in evaluation mode. Raises IndexFault if its file is damaged."""
        if self._network is None:
            self._network = _read_network(self.folder, self.manifest)
        if self.config.rerank.enabled:
            with reading(self.folder / FILE, "the settings of an index of this network", IndexFault):
                facet_reader(self._network, self.config.rerank)
        return self._network.to(self.device).eval()

    @cached_property
    def describer(self) -> Describer:
        """The network for use by itself: `describe`, `local`, `match`."""
        return Describer(self.network, self.config, str(self.folder), model_of(self.folder, self.manifest))

    @cached_property
    def features(self) -> StoredFeatures:
        """Descriptors and local features of all photographs. Raises FeatureError naming a shard that is damaged."""
        stored = StoredFeatures.joined(
            [
                StoredFeatures(part_folder(self.folder, name), shard_bounds_of(part.counts))
                for name, part in zip(self.manifest.parts, self.parts, strict=True)
            ]
        )
        if self.config.rerank.enabled and not all("codes" in shard for shard in stored.shards):
            raise IndexFault(f"{self.folder}: re-ranks, by {FILE}, but not all of its shards hold local features")
        return stored

    @cached_property
    def images(self) -> Images:
        """Names, positions, times and digests of all photographs."""
        return joined_images(
            [
                read_images(part_folder(self.folder, name), part.images, in_metres=part.in_metres)
                for name, part in zip(self.manifest.parts, self.parts, strict=True)
            ]
        )

    @property
    def threshold(self) -> float:
        """From this confidence on a photograph is taken to be of the map; NaN if the index is too small to teach it."""
        return float("nan") if self.manifest.verdict is None else float(self.manifest.verdict["threshold"])

    def path_of(self, number: int) -> Path | None:
        """The file that a photograph was read from, if it is on this machine still."""
        path = Path(self.root_of(number)) / self.images.names[number]
        return path if path.is_file() else None

    def root_of(self, number: int) -> str:
        """The folder or address that a photograph's name starts from."""
        ends = np.cumsum([part.images for part in self.parts])
        return self.parts[int(np.searchsorted(ends, number, side="right"))].root

    def locate(self, images: GivenImages, *, top_k: int = 5, sequence: bool = False) -> list[Location]:
        """Where each photograph was taken: a `Location` per image, in their order.

        `images` is one image or several: file names, bytes of files, PIL images, arrays [H, W, 3], tensors [3, H, W].
        Each location has the `top_k` best candidates. With `sequence` the images are frames in their order, and each
        is judged with its neighbours'. An image that cannot be read has no candidates and says why in `error`; nothing
        is raised for it.
        """
        given = as_list(images)
        if sequence:
            return self.locate_sequence(given, top_k=top_k)
        return list(self.locate_each(given, top_k=top_k))

    def locate_each(
        self, images: Iterable[GivenImage], *, names: Iterable[str] | None = None, top_k: int = 5, at_once: int = 0
    ) -> Iterator[Location]:
        """The same, one after another, for any number of images: `at_once` of them (four batches) are held at a time.

        `names` are those of the locations; the file's, or `image N`, without it.
        """
        at_once, named = at_once or BATCHES * self.config.batch_size, iter(names) if names is not None else None
        upcoming, first = iter(images), 0
        while chunk := list(itertools.islice(upcoming, at_once)):
            own = [_name_of(image, first + i) for i, image in enumerate(chunk)]
            yield from self._locate_chunk(
                chunk, own if named is None else list(itertools.islice(named, len(chunk))), top_k
            )
            first += len(chunk)

    def locate_sequence(
        self, images: Sequence[GivenImage], *, names: Sequence[str] | None = None, top_k: int = 5
    ) -> list[Location]:
        """Frames of a video in their order, each judged with its neighbours' candidates; see `eval.index.sequence`."""
        own = list(names) if names is not None else [_name_of(image, i) for i, image in enumerate(images)]
        chunks: list[Found] = []
        descriptors: list[NDArray[np.float32]] = []
        row_of: dict[int, int] = {}
        errors: dict[int, str] = {}
        size = BATCHES * self.config.batch_size
        for first in range(0, len(images), size):
            queries, read, faults = self.encode(images[first : first + size], own[first : first + size])
            row_of |= {first + number: len(row_of) + row for row, number in enumerate(read)}
            errors |= {first + number: fault for number, fault in faults.items()}
            if read:
                descriptors.append(queries.descriptors())
                chunks.append(self.find(queries, max(top_k, 1)))
        if not row_of:
            return [_unread(name, errors[i]) for i, name in enumerate(own)]
        found, descriptor_QD = smooth(stacked(chunks), self.images.positions), np.concatenate(descriptors)
        return [
            replace(self.location(name, found, row_of[i], top_k), descriptor=descriptor_QD[row_of[i]])
            if i in row_of
            else _unread(name, errors[i])
            for i, name in enumerate(own)
        ]

    def _locate_chunk(self, images: Sequence[GivenImage], names: Sequence[str], top_k: int) -> Iterator[Location]:
        queries, read, errors = self.encode(images, names)
        found, row_of = self.find(queries, max(top_k, 1)), {number: row for row, number in enumerate(read)}
        for i, name in enumerate(names):
            if i in row_of:
                location = self.location(name, found, row_of[i], top_k)
                yield replace(location, descriptor=queries.descriptors(row_of[i], row_of[i] + 1)[0])
            else:
                yield _unread(name, errors[i])

    def encode(
        self, images: Sequence[GivenImage], names: Sequence[str]
    ) -> tuple[StoredFeatures, list[int], dict[int, str]]:
        """Features of the images that can be read, the numbers of these, and why the others cannot."""
        errors: dict[int, str] = {}

        def load(i: int) -> torch.Tensor:
            return pixels(images[i], self.config, self.network.spec.patch, names[i])

        def note(i: int, error: UnreadableImageError | OSError) -> None:
            errors[i] = reason(error)

        batches = image_batches(len(images), load, self.config, note)
        found = encode(self.network, batches, self.config, lambda i: names[i])
        read = sorted(found)
        shard = shard_of(self.network, found, read, self.config)
        return StoredFeatures.in_memory({name: tensor.numpy() for name, tensor in shard.items()}), read, errors

    def find(self, queries: StoredFeatures, k: int) -> Found:
        """The k best photographs of the index for each query, by retrieval and, if it holds local features, matching.

        The candidates and their order are those of `rerankvpr eval` with these settings.
        """
        on, count = self.config.rerank.enabled, len(queries)
        width = min(max(k, self.config.rerank.top_k if on else 1), len(self))
        if not width or not count:
            return nothing_found(count)
        scores_QK, ids_QK = self.search(queries.descriptors(), width)
        similarities_QK, nan_QK = scores_QK.astype(np.float32), np.full(ids_QK.shape, np.nan)
        if not on:
            return Found(ids_QK, similarities_QK, nan_QK.astype(np.float32), nan_QK, np.zeros(count, np.int64))
        settings = self.config.rerank
        if queries.channels != self.features.channels:
            theirs, ours = self.features.channels, queries.channels
            raise IndexFault(f"{self.folder}: its local features have {theirs} numbers, by its {FILE} they have {ours}")
        found = rerank(queries, self.features, ids_QK, similarities_QK, settings, self.device, score=score_here)
        patches_Q, matched = patch_counts(queries), found.scores_QT.shape[1]
        matches_QK, keys_QK = nan_QK.astype(np.float32), nan_QK.copy()
        matches_QK[:, :matched] = found.scores_QT
        mass_Q = patch_mass(queries, settings)
        keys_QK[:, :matched] = fuse(found.scores_QT, similarities_QK[:, :matched], mass_Q, settings.global_weight)
        order_QK = _order(ids_QK, found.predictions_QK)
        return Found(
            found.predictions_QK,
            np.take_along_axis(similarities_QK, order_QK, axis=1),
            np.take_along_axis(matches_QK, order_QK, axis=1),
            np.take_along_axis(keys_QK, order_QK, axis=1),
            patches_Q,
        )

    def search(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores float64 [Q, k] and numbers int64 [Q, k] of the photographs whose descriptors are nearest."""
        if self.manifest.approximate is not None:
            return search_stored(self._approximate, self.features, queries_QD, k)
        return search_blocks(queries_QD, self._blocks(), k)

    @cached_property
    def _approximate(self) -> list[Block]:
        asked = self.manifest.approximate or {}
        return open_blocks(self.folder, self.manifest.parts, self.parts, asked["factory"], asked["params"])

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32] | Rows]]:
        if self._held is not None:
            yield 0, self._held
            return
        yield from self.features.blocks(0, 1, BLOCK_BYTES)

    @cached_property
    def _held(self) -> Rows | None:
        """All descriptors in memory, where they are few enough."""
        size = sum(shard["descriptors"].nbytes for shard in self.features.shards)
        return Rows(self.features.descriptors()) if size <= HELD_BYTES else None

    def location(self, query: str, found: Found, row: int, top_k: int) -> Location:
        """What was found for one query."""
        ids = found.ids_QK[row]
        ids = ids[ids >= 0]
        positions = taken(self.images.positions, ids)
        weight = found.matches_QK[row, : len(ids)].astype(np.float64)
        if np.isnan(weight).all():
            weight = found.similarities_QK[row, : len(ids)].astype(np.float64)
        weight = np.nan_to_num(weight)
        told = confidence(
            found.matches_QK[row, : len(ids)], found.similarities_QK[row, : len(ids)], int(found.patches_Q[row])
        )
        shown = ids[:top_k]
        apart_m = distances(taken(self.images.positions, shown))[0] if len(shown) else np.zeros(0)
        candidates = tuple(
            Candidate(
                number=int(number),
                name=self.images.names[number],
                root=self.root_of(int(number)),
                similarity=float(found.similarities_QK[row, i]),
                matches=None if np.isnan(found.matches_QK[row, i]) else float(found.matches_QK[row, i]),
                lat=float(positions.lat[i]),
                lon=float(positions.lon[i]),
                east=float(positions.east[i]),
                north=float(positions.north[i]),
                zone=int(positions.zone[i]),
                apart_m=float(apart_m[i]),
            )
            for i, number in enumerate(shown)
        )
        return Location(
            query=query,
            candidates=candidates,
            position=estimate(positions, weight**2),
            confidence=told,
            threshold=self.threshold,
            in_map=None if np.isnan(self.threshold) or np.isnan(told) else told > self.threshold,
            patches=int(found.patches_Q[row]),
        )


def _order(before_QK: NDArray[np.int64], after_QK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of the numbers `after` is in the row of those `before`; both hold the same ones."""
    rank = np.argsort(before_QK, axis=1, kind="stable")
    goal = np.argsort(np.argsort(after_QK, axis=1, kind="stable"), axis=1, kind="stable")
    return np.take_along_axis(rank, goal, axis=1)


def shard_bounds_of(counts: Sequence[int]) -> list[tuple[int, int]]:
    """First and past-the-last image of each shard of a part, from their counts."""
    ends = np.cumsum([0, *counts]).tolist()
    return list(itertools.pairwise(ends))


def _unread(name: str, error: str) -> Location:
    return Location(name, (), None, np.nan, np.nan, None, error=error)


def _name_of(image: GivenImage, number: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {number}"


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _read_network(folder: Path, manifest: Manifest) -> PlaceModel:
    file = folder / NETWORK
    state = read_tensors(file)
    with reading(folder / FILE, "the description of a network", IndexFault):
        model = meta_model(model_of(folder, manifest))
        merge_lora(model)  # as the network was when it was stored
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if {key: tensor.shape for key, tensor in state.items()} != expected:
        raise IndexFault(f"{file}: not the network that {folder} describes; build the index again")
    materialise(model, state)
    model.to(DTYPES[manifest.precision])
    model.cast_frozen()
    if weights_digest(model) != manifest.weights:
        raise IndexFault(f"{file} is damaged, or not the network that {folder} was made with; build the index again")
    return model
