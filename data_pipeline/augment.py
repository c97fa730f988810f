"""Augmentation of whole uint8 batches on the model's device, seeded per image, drawn on the host beforehand."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from configs.host_copies import to_device
from data_pipeline.warp import GEOMETRIC, grids, sharpen, warp

WARPED = "warped"  # the group of all that `GEOMETRIC` operations move
Operation = tuple[str, float]  # name and magnitude


def image_seeds(seed: int, epoch: int, place_ids: torch.Tensor, views: torch.Tensor) -> list[int]:
    """One 63-bit seed an image from (seed, epoch, place, view), so that no rank or world size enters."""
    return [
        int(
            np.random.SeedSequence([seed, epoch, int(place), int(view)]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        )
        for place, view in zip(place_ids.tolist(), views.tolist(), strict=True)
    ]


class Group(NamedTuple):
    """The images of a batch that go through an operation together: a part of `Drawn.indices_2X`."""

    name: str
    magnitude: float
    part: slice


@dataclass(frozen=True)
class Drawn:
    """What each image of a batch is put through, known on the host; the images' numbers go over in one tensor."""

    turns: list[list[Group]]  # no image is in two groups of a turn
    indices_2X: torch.Tensor  # int64: images, group after group, and for `WARPED` ones their grid
    warps: tuple[Operation, ...]  # what the grids are of


class BatchedRandAugment(v2.RandAugment):
    """RandAugment (Cubuk et al., 2020) as torchvision defines it: each image draws by its own seed, and images that
    drew the same operation are transformed together; those that are moved in any way, all together.
    """

    def draw(self, seed: int, height: int, width: int) -> list[Operation]:
        """The operations and magnitudes that torchvision's RandAugment draws after `torch.manual_seed(seed)`."""
        generator = torch.Generator().manual_seed(seed)
        space = self._space(height, width)
        drawn = []
        for _ in range(self.num_ops):
            name, magnitude, signed = space[int(torch.randint(len(space), (), generator=generator))]
            if signed and float(torch.rand((), generator=generator)) <= 0.5:
                magnitude = -magnitude
            drawn.append((name, magnitude))
        return drawn

    def draw_batch(self, seeds: Sequence[int], height: int, width: int) -> Drawn:
        """What images of these seeds are put through; from any thread."""
        drawn = [self.draw(seed, height, width) for seed in seeds]
        warps = tuple(
            (name, sign * magnitude)
            for name, magnitude, _ in self._space(height, width)
            if name in GEOMETRIC
            for sign in (1, -1)
        )
        number_of = {operation: number for number, operation in enumerate(warps)}
        turns: list[list[Group]] = []
        images: list[int] = []
        grid_numbers: list[int] = []
        for turn in range(self.num_ops):
            alike: defaultdict[Operation, list[int]] = defaultdict(list)
            for image, operations in enumerate(drawn):
                name, magnitude = operations[turn]
                if name != "Identity" and (name != "Rotate" or magnitude):  # torchvision turns by nothing by a copy
                    alike[(WARPED, 0.0) if name in GEOMETRIC else (name, magnitude)].append(image)
            turns.append([])
            for (name, magnitude), members in alike.items():
                turns[-1].append(Group(name, magnitude, slice(len(images), len(images) + len(members))))
                images += members
                grid_numbers += [number_of.get(drawn[image][turn], 0) for image in members]
        return Drawn(turns, torch.tensor([images, grid_numbers], dtype=torch.int64), warps)

    def apply(self, images_B3HW: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """uint8 images of any device, each put through what was drawn for it; the host does not wait."""
        out_B3HW = images_B3HW.clone(memory_format=torch.contiguous_format)
        images_X, grids_X = to_device(drawn.indices_2X, out_B3HW.device)
        for group in (group for turn in drawn.turns for group in turn):
            rows = images_X[group.part]
            if group.name == WARPED:
                table_GHW2 = grids(drawn.warps, *out_B3HW.shape[-2:], out_B3HW.device)
                changed = warp(out_B3HW[rows], table_GHW2[grids_X[group.part]])
            elif group.name == "Sharpness":
                changed = sharpen(out_B3HW[rows], 1.0 + group.magnitude)
            else:
                changed = self._apply_image_or_video_transform(
                    out_B3HW[rows], group.name, group.magnitude, interpolation=self.interpolation, fill=self._fill
                )
            out_B3HW[rows] = changed
        return out_B3HW

    def _space(self, height: int, width: int) -> list[tuple[str, float, bool]]:
        """Each operation with its magnitude for images of this size, and whether it draws a sign."""
        return _space(self.magnitude, self.num_magnitude_bins, height, width)


@functools.lru_cache(maxsize=8)
def _space(magnitude: int, num_bins: int, height: int, width: int) -> list[tuple[str, float, bool]]:
    found = []
    for name, (magnitudes_of, signed) in v2.RandAugment._AUGMENTATION_SPACE.items():
        magnitudes = magnitudes_of(num_bins, height, width)
        value = 0.0 if magnitudes is None else float(magnitudes[magnitude])
        found.append((name, value, signed and magnitudes is not None))
    return found


def randaugment_of(num_ops: int, magnitude: int) -> BatchedRandAugment:
    """RandAugment that turns and shears bilinearly (torchvision has no bicubic)."""
    return BatchedRandAugment(num_ops=num_ops, magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)


def randaugment(images_B3HW: torch.Tensor, seeds: list[int], *, num_ops: int, magnitude: int) -> torch.Tensor:
    """RandAugment of uint8 images, each by its own seed."""
    transform = randaugment_of(num_ops, magnitude)
    return transform.apply(images_B3HW, transform.draw_batch(seeds, *images_B3HW.shape[-2:]))
