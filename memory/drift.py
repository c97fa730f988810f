"""How fast stored descriptors go stale: a few images kept beside the queue are encoded again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn


class DriftProbe(nn.Module):
    """Images of past steps with their descriptors as stored, the same on every rank, over the ages that a queue holds.

    Every `every` steps some images of the batch are kept, for as long as the queue keeps their descriptors; where that
    would be more than `num_images`, only at every second, third... time.
    """

    images_GKI: torch.Tensor  # K images [3, H, W], uint8, of each of G past steps
    descriptors_GKD: torch.Tensor
    steps_G: torch.Tensor  # -1 where none is kept yet
    curve_a2: torch.Tensor  # (age in optimizer steps, cosine of stored and present descriptor), as last measured

    def __init__(
        self,
        *,
        every: int,
        num_images: int,
        queue_steps: int,
        image_shape: tuple[int, ...],
        descriptor_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`queue_steps` is the greatest age in the queue, M / N rounded up."""
        super().__init__()
        self.every = every
        ages = max(1, math.ceil(queue_steps / every))
        self.keep_every = every * math.ceil(ages / num_images)
        groups = math.ceil(queue_steps / self.keep_every)
        per_group = max(1, num_images // groups)
        self.register_buffer(
            "images_GKI", torch.zeros(groups, per_group, *image_shape, dtype=torch.uint8, device=device)
        )
        self.register_buffer("descriptors_GKD", torch.zeros(groups, per_group, descriptor_size, device=device))
        self.register_buffer("steps_G", torch.full((groups,), -1, dtype=torch.int64, device=device))
        self.register_buffer("curve_a2", torch.zeros(0, 2, device=device))

    def due(self, step: int) -> bool:
        """Whether a step begins with a measurement."""
        return step % self.every == 0

    @torch.no_grad()
    def keep(self, local_images_BI: torch.Tensor, descriptors_ND: torch.Tensor, step: int) -> None:
        """Keeps images of a step's global batch, evenly spaced, if it is its turn; every rank must call this."""
        if step % self.keep_every:
            return
        batch, local = len(descriptors_ND), len(local_images_BI)
        group = step // self.keep_every % len(self.steps_G)
        picks_K = torch.arange(self.images_GKI.shape[1]) * batch // self.images_GKI.shape[1]
        own_K = picks_K // local == dist.get_rank()
        images_KI = torch.zeros_like(self.images_GKI[group])
        images_KI[own_K.to(images_KI.device)] = local_images_BI[(picks_K[own_K] % local).to(local_images_BI.device)]
        dist.all_reduce(images_KI)  # each image is zero on all ranks but one
        self.images_GKI[group] = images_KI
        self.descriptors_GKD[group] = descriptors_ND[picks_K.to(descriptors_ND.device)].to(self.descriptors_GKD)
        self.steps_G[group] = step

    @torch.no_grad()
    def measure(self, encode: Callable[[torch.Tensor], torch.Tensor], step: int) -> dict[str, float]:
        """Encodes the kept images again, shared out over ranks, and returns the mean cosine by age (`drift_age_<a>`).

        `encode` maps uint8 images to L2-normalised descriptors; each rank calls it for equally many.
        """
        groups = [g for g, kept in enumerate(self.steps_G.tolist()) if 0 <= kept < step]
        if not groups:
            return {}
        images_FI = self.images_GKI[groups].flatten(0, 1)
        stored_FD = self.descriptors_GKD[groups].flatten(0, 1)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        share = math.ceil(len(images_FI) / world_size)
        mine = torch.arange(rank * share, (rank + 1) * share, device=images_FI.device)
        cosine_F = stored_FD.new_zeros(share * world_size)
        now_fD = encode(images_FI[mine.clamp(max=len(images_FI) - 1)]).to(stored_FD)
        cosine_F[mine] = (now_fD * stored_FD[mine.clamp(max=len(images_FI) - 1)]).sum(1)
        dist.all_reduce(cosine_F)
        cosine_G = cosine_F[: len(images_FI)].view(len(groups), -1).mean(1)
        age_G = (step - self.steps_G[groups]).to(cosine_G)
        order = age_G.argsort()
        self.curve_a2 = torch.stack([age_G, cosine_G], dim=1)[order]
        return {f"drift_age_{int(age):06d}": cosine for age, cosine in self.curve_a2.tolist()}

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        self.curve_a2 = self.curve_a2.new_zeros(state_dict[f"{prefix}curve_a2"].shape)  # as long as it was measured
        super()._load_from_state_dict(state_dict, prefix, *args)
