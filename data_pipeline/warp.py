"""Geometric operations and sharpening as torchvision computes them, for a whole batch and without a wait.

torchvision warps images of one operation and magnitude at a time, and copies a matrix to the device for each call. Here
each image has its own row of a table of grids, which a device is given once. The pixels are torchvision's.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional._geometry import _affine_grid, _get_inverse_affine_matrix

from configs.host_copies import to_device

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def grid(name: str, magnitude: float, height: int, width: int) -> torch.Tensor:
    """Where an operation of `GEOMETRIC` takes each pixel from, [H, W, 2] as grid_sample reads it, on the CPU."""
    centre, angle, translate, shear = [0.0, 0.0], 0.0, [0.0, 0.0], [0.0, 0.0]
    if name.startswith("Shear"):
        shear[name == "ShearY"] = math.degrees(math.atan(magnitude))
        centre = [-0.5 * width, -0.5 * height]  # RandAugment shears about the corner
    elif name.startswith("Translate"):
        translate[name == "TranslateY"] = float(int(magnitude))
    else:
        angle = -(magnitude % 360)
    matrix = _get_inverse_affine_matrix(centre, angle, translate, 1.0, shear)
    theta_123 = torch.tensor(matrix, dtype=torch.float32).reshape(1, 2, 3)
    return _affine_grid(theta_123, w=width, h=height, ow=width, oh=height)[0]


@functools.lru_cache(maxsize=8)
def grids(operations: tuple[tuple[str, float], ...], height: int, width: int, device: torch.device) -> torch.Tensor:
    """The grids of these operations and magnitudes on a device, [G, H, W, 2]."""
    return to_device(torch.stack([grid(name, magnitude, height, width) for name, magnitude in operations]), device)


def warp(images_B3HW: torch.Tensor, grids_BHW2: torch.Tensor) -> torch.Tensor:
    """uint8 images, each by its own grid, bilinearly; black where it reaches beyond the image."""
    sampled = F.grid_sample(
        images_B3HW.to(torch.float32), grids_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.round_().to(torch.uint8)


@functools.lru_cache(maxsize=8)
def _blur(device: torch.device) -> torch.Tensor:
    a, b = 1.0 / 13.0, 5.0 / 13.0
    return to_device(torch.tensor([[a, a, a], [a, b, a], [a, a, a]]), device).expand(3, 1, 3, 3)


def sharpen(images_B3HW: torch.Tensor, factor: float) -> torch.Tensor:
    """uint8 images, 0 blurred, 1 as they are, above sharper (torchvision's adjust_sharpness)."""
    if min(images_B3HW.shape[-2:]) <= 2:
        return images_B3HW
    out = images_B3HW.to(torch.float32, copy=True)
    blurred = F.conv2d(out, _blur(images_B3HW.device), groups=3).round_()
    inner = out[..., 1:-1, 1:-1]
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return out.clamp_(0, 255).to(torch.uint8)
