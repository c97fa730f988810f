"""A network with the rule for its pixels: images in, in whatever form; descriptors, local features and matches out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import EvalConfig, ModelConfig
from eval.features import Patches, shard_bounds
from eval.forward import Encoded, encode_images
from eval.given_images import GivenImage, GivenImages, Pixels, as_list, pixels_of
from eval.local_features import NO_CELL
from eval.matching import agreeing, mutual_matches, score_matches, similarities
from eval.pixels import pixel_rule
from model.network import PlaceModel


@dataclass(frozen=True)
class LocalImage:
    """One image's descriptor and its N salient patches, as re-ranking stores and compares them."""

    descriptor_D: NDArray[np.float32]  # L2-normalised
    codes_NC: NDArray[np.float32]  # L2-normalised before they were rounded to `rerank.dtype`
    cell_N2: NDArray[np.int64]  # row and column on the grid of patches
    saliency_N: NDArray[np.float32]  # 0 to 1, min-max normalised in the image
    grid: tuple[int, int]  # rows and columns of patches
    size: tuple[int, int]  # height and width of the image as it was given, upright

    @property
    def points_N2(self) -> NDArray[np.float32]:
        """Centres (x, y) of the patches in pixels of the image as it was given; NaN for a class token."""
        points_N2 = (self.cell_N2[:, ::-1] + 0.5) * (np.array(self.size) / self.grid)[::-1]
        points_N2[self.cell_N2[:, 0] == NO_CELL] = np.nan
        return points_N2.astype(np.float32)


@dataclass(frozen=True)
class Match:
    """What two images share: M mutual nearest patches, the most alike first."""

    score: float  # as in re-ranking: matches that agree on one shift, or the sum of their cosines
    similarity: float  # cosine of the two descriptors
    points_a_M2: NDArray[np.float32]  # (x, y) in pixels of the first image as it was given
    points_b_M2: NDArray[np.float32]
    cosine_M: NDArray[np.float32]
    agrees_M: NDArray[np.bool_]  # whether a match counts in the score


class Describer:
    """A network for use: `describe`, `local` and `match` take images in any form and resize them by one rule.

    The rule is that of `config`, which `rerankvpr.load` takes from the training: the descriptors are those of
    `rerankvpr eval`, to the bit where images, batch size, threads and device are the same. One thread at a time.
    """

    def __init__(
        self, model: PlaceModel, config: EvalConfig, source: str = "", network: ModelConfig | None = None
    ) -> None:
        if config.rerank.project != "none":  # a projection belongs to a database
            config = config.model_copy(update={"rerank": config.rerank.model_copy(update={"project": "none"})})
        self.model = model.eval()
        self.config = config
        self.source = source
        self.network = network  # the recipe's section that the model was built from, where it is known

    def __repr__(self) -> str:
        return f"Describer({self.source!r}, {self.descriptor_size} numbers, {self.pixels}, {self.device})"

    @property
    def descriptor_size(self) -> int:
        """D, the length of a descriptor."""
        return self.model.descriptor_size

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.device

    @property
    def pixels(self) -> str:
        """How images are resized, such as `224 px square, bilinear`."""
        return pixel_rule(self.config)

    @overload
    def describe(
        self, images: GivenImages, *, batch_size: int | None = ..., out: Literal["numpy"] = ...
    ) -> NDArray[np.float32]: ...
    @overload
    def describe(self, images: GivenImages, *, batch_size: int | None = ..., out: Literal["torch"]) -> torch.Tensor: ...
    def describe(
        self, images: GivenImages, *, batch_size: int | None = None, out: Literal["numpy", "torch"] = "numpy"
    ) -> NDArray[np.float32] | torch.Tensor:
        """Descriptors [N, D] of N images, float32, L2-normalised: a NumPy array, or a tensor on the network's device.

        `images` is one image or several: file names, bytes of files (JPEG, PNG, ...), PIL images, NumPy arrays
        [H, W, 3], tensors [3, H, W] (uint8, or floats from 0 to 1), or a batch of these in one array. They are read in
        threads and need not have one size. `batch_size` images go through the network at a time (the recipe's
        `eval.batch_size`). Raises ValueError or OSError naming the image that cannot be read.
        """
        if out not in ("numpy", "torch"):
            raise ValueError(f"out {out!r} is not known; use numpy or torch")
        given = as_list(images)
        config = self._config(batch_size, local=False)
        descriptors_ND = torch.zeros(len(given), self.descriptor_size, device=self.device)
        for numbers, _, encoded in self._encode(given, config):
            descriptors_ND[numbers] = encoded.descriptor_BD.float()
        return descriptors_ND if out == "torch" else descriptors_ND.cpu().numpy()

    def local(self, images: GivenImages, *, batch_size: int | None = None) -> list[LocalImage]:
        """Descriptor and local features of each image; see `describe` for what images are.

        A list also for one image. Patches are those that re-ranking keeps: `rerank.saliency_thresh` decides.
        """
        given = as_list(images)
        found: list[Any] = [None] * len(given)
        for numbers, pixels, encoded in self._encode(given, self._config(batch_size, local=True)):
            assert encoded.local is not None
            kept, descriptors_BD = encoded.local, encoded.descriptor_BD.float().cpu().numpy()
            sizes = kept.count_I.tolist()
            codes_PC = kept.codes_PC.float() * kept.scale_P[:, None]
            parts = [t.cpu().split(sizes) for t in (codes_PC, kept.cell_P2.long(), kept.saliency_P.float())]
            for i, number in enumerate(numbers):
                codes, cell, saliency = (part[i].numpy() for part in parts)
                found[number] = LocalImage(descriptors_BD[i], codes, cell, saliency, encoded.grid, pixels[i].size)
        return found

    def match(self, a: GivenImage | LocalImage, b: GivenImage | LocalImage) -> Match:
        """What image `a` (the query) shares with image `b`, by the re-ranking's rule; either may come from `local`.

        The score is the one that `eval` gives the pair, unless it stores projected features (`rerank.project`).
        """
        one, other = (x if isinstance(x, LocalImage) else self._one(x) for x in (a, b))
        rerank = self.config.rerank
        query, candidate = _patches(one), _patches(other)
        matches = mutual_matches(similarities(query.codes_BMC, candidate.codes_BMC[:, None]), rerank.nn_match_thresh)
        score = float(score_matches(matches, query, candidate, rerank))
        matched_M = matches.matched_BNT[0, :, 0].nonzero().flatten()
        cosine_M, nearest_M = matches.cosine_BNT[0, matched_M, 0], matches.nearest_BNT[0, matched_M, 0]
        order = cosine_M.argsort(descending=True, stable=True)
        matched_M, cosine_M, nearest_M = matched_M[order], cosine_M[order], nearest_M[order]
        agrees_M = torch.ones_like(matched_M, dtype=torch.bool)
        if rerank.geometry != "none":
            own_M2, other_M2 = query.cell_BM2[0, matched_M], candidate.cell_BM2[0, nearest_M]
            on_grid = (own_M2[:, 0] != NO_CELL) & (other_M2[:, 0] != NO_CELL)
            weight_M = cosine_M if rerank.score == "similarity_sum" else torch.ones_like(cosine_M)
            agrees_M = torch.zeros_like(on_grid)
            agrees_M[on_grid] = agreeing((other_M2 - own_M2)[on_grid], weight_M[on_grid], rerank.geometry_cells)
        return Match(
            score=score,
            similarity=float(one.descriptor_D @ other.descriptor_D),
            points_a_M2=one.points_N2[matched_M.numpy()],
            points_b_M2=other.points_N2[nearest_M.numpy()],
            cosine_M=cosine_M.numpy(),
            agrees_M=agrees_M.numpy(),
        )

    def _one(self, image: GivenImage) -> LocalImage:
        images = self.local(image)
        if len(images) != 1:
            raise ValueError(f"match takes one image on each side, not {len(images)}")
        return images[0]

    def _config(self, batch_size: int | None, *, local: bool) -> EvalConfig:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        rerank = self.config.rerank.model_copy(update={"enabled": local})
        return self.config.model_copy(update={"rerank": rerank, "batch_size": batch_size or self.config.batch_size})

    def _encode(self, given: list[GivenImage], config: EvalConfig) -> Iterator[tuple[list[int], list[Pixels], Encoded]]:
        """Numbers, pixels and features of batches, which are those of an extraction over the same list of files."""
        for first, stop in shard_bounds(len(given), config.batch_size):
            for numbers, pixels in _batches(given[first:stop], config, self.model.spec.patch, first):
                images_B3HW = torch.stack([one.image_3HW for one in pixels])
                encoded = encode_images(self.model, images_B3HW, config)
                finite_B = encoded.descriptor_BD.isfinite().all(dim=1).cpu()
                if not finite_B.all():
                    number = numbers[int(finite_B.int().argmin())]
                    raise ValueError(f"{_name(given[number], number)}: the descriptor is not finite; are the weights?")
                yield numbers, pixels, encoded


def _batches(
    given: list[GivenImage], config: EvalConfig, patch: int, first: int
) -> Iterator[tuple[list[int], list[Pixels]]]:
    """Batches of images of one size with their numbers, read ahead; in the order of `eval.extract`'s."""
    buckets: dict[torch.Size, list[tuple[int, Pixels]]] = defaultdict(list)
    waiting: deque[Future[Pixels]] = deque()
    upcoming = iter(enumerate(given, first))
    number = first
    pool = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="read")
    try:
        while True:
            while len(waiting) < 3 * config.batch_size and (item := next(upcoming, None)):
                waiting.append(pool.submit(pixels_of, item[1], config, patch, _name(item[1], item[0])))
            if not waiting:
                break
            pixels = waiting.popleft().result()
            bucket = buckets[pixels.image_3HW.shape]
            bucket.append((number, pixels))
            number += 1
            if len(bucket) == config.batch_size:
                yield [n for n, _ in bucket], [p for _, p in bucket]
                bucket.clear()
        for bucket in buckets.values():
            if bucket:
                yield [n for n, _ in bucket], [p for _, p in bucket]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _name(given: GivenImage, number: int) -> str:
    """How an error calls an image: by its file, or its number."""
    return str(given) if isinstance(given, str) or hasattr(given, "__fspath__") else f"image {number}"


def _patches(image: LocalImage) -> Patches:
    """One image's patches as matching takes them; at least one, which is padding where there is none."""
    count = len(image.codes_NC)
    width = max(count, 1)
    codes_BMC = torch.zeros(1, width, image.codes_NC.shape[1])
    cell_BM2 = torch.zeros(1, width, 2, dtype=torch.int64)
    saliency_BM = torch.full((1, width), -1.0)
    codes_BMC[0, :count] = torch.from_numpy(image.codes_NC)
    cell_BM2[0, :count] = torch.from_numpy(image.cell_N2)
    saliency_BM[0, :count] = torch.from_numpy(image.saliency_N)
    return Patches(codes_BMC, torch.tensor([count]), cell_BM2, saliency_BM)
