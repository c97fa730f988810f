"""Augmentation of uint8 batches on the model's device, seeded per image."""

from __future__ import annotations

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


def randaugment(images_B3HW: torch.Tensor, seeds: list[int], *, num_ops: int, magnitude: int) -> torch.Tensor:
    """RandAugment (Cubuk et al., 2020) as torchvision defines it, of uint8 images, each by its own seed."""
    transform = v2.RandAugment(num_ops=num_ops, magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    out = torch.empty_like(images_B3HW)
    with torch.random.fork_rng(devices=[]):  # torchvision draws operations and signs from the CPU's generator
        for i, seed in enumerate(seeds):
            torch.manual_seed(seed)
            out[i] = transform(images_B3HW[i])
    return out
