"""Augmentation of uint8 batches on the model's device, seeded per image."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2


def image_seeds(seed: int, epoch: int, place_ids: torch.Tensor, views: torch.Tensor) -> list[int]:
    """One 63-bit seed an image from (seed, epoch, place, view), so that no rank or world size enters."""
    return [
        int(
            np.random.SeedSequence([seed, epoch, int(place), int(view)]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        )
        for place, view in zip(place_ids.tolist(), views.tolist(), strict=True)
    ]


class BatchedRandAugment(v2.RandAugment):
    """RandAugment (Cubuk et al., 2020) as torchvision defines it: each image draws by its own seed, and images that
    drew the same operation are transformed together.
    """

    def draw(self, seed: int, height: int, width: int) -> list[tuple[str, float]]:
        """The operations and magnitudes that torchvision's RandAugment draws after `torch.manual_seed(seed)`."""
        generator = torch.Generator().manual_seed(seed)
        names, drawn = list(self._AUGMENTATION_SPACE), []
        for _ in range(self.num_ops):
            name = names[int(torch.randint(len(names), (), generator=generator))]
            magnitudes_of, signed = self._AUGMENTATION_SPACE[name]
            magnitudes = magnitudes_of(self.num_magnitude_bins, height, width)
            magnitude = 0.0 if magnitudes is None else float(magnitudes[self.magnitude])
            if magnitudes is not None and signed and float(torch.rand((), generator=generator)) <= 0.5:
                magnitude = -magnitude
            drawn.append((name, magnitude))
        return drawn

    def augment(self, images_B3HW: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        """uint8 images of any device, each augmented by its seed."""
        drawn = [self.draw(seed, *images_B3HW.shape[-2:]) for seed in seeds]
        out_B3HW = images_B3HW.clone(memory_format=torch.contiguous_format)
        for turn in range(self.num_ops):
            alike: defaultdict[tuple[str, float], list[int]] = defaultdict(list)
            for image, operations in enumerate(drawn):
                alike[operations[turn]].append(image)
            for (name, magnitude), members in alike.items():
                if name != "Identity":
                    rows = torch.tensor(members, device=out_B3HW.device)
                    out_B3HW[rows] = self._apply_image_or_video_transform(
                        out_B3HW[rows], name, magnitude, interpolation=self.interpolation, fill=self._fill
                    )
        return out_B3HW


def randaugment(images_B3HW: torch.Tensor, seeds: list[int], *, num_ops: int, magnitude: int) -> torch.Tensor:
    """RandAugment of uint8 images, each by its own seed, turned and sheared bilinearly (torchvision has no bicubic)."""
    transform = BatchedRandAugment(num_ops=num_ops, magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    return transform.augment(images_B3HW, seeds)
