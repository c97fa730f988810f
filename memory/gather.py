"""All-gather over ranks, in rank order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from configs.traced import part


def all_gather(local: torch.Tensor) -> torch.Tensor:
    """`local` of all ranks, concatenated along the first dimension in rank order, without gradient."""
    out = local.new_empty(dist.get_world_size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(out, local.detach().contiguous())
    return out


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BD: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        with part("gather descriptors"):
            return all_gather(local_BD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        (grad_ND,) = grads
        grad_BD = grad_ND.new_empty(grad_ND.shape[0] // dist.get_world_size(), *grad_ND.shape[1:])
        with part("scatter gradients of descriptors"):
            dist.reduce_scatter_tensor(grad_BD, grad_ND.contiguous())
        return grad_BD


def all_gather_with_grad(local_BD: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order [W*B, D]; the backward pass sums each row's gradient over ranks.

    All ranks hold the same number of rows.
    """
    gathered: torch.Tensor = _AllGatherWithGrad.apply(local_BD)
    return gathered


def check_equal_batches(local_BD: torch.Tensor, place_ids_B: torch.Tensor) -> None:
    """Raises ValueError on every rank, naming the ranks, unless all hold equally many descriptors of one size."""
    check_one_id_each(local_BD, place_ids_B)
    shapes = all_gather(torch.tensor([local_BD.shape], device=local_BD.device)).tolist()
    if len({tuple(shape) for shape in shapes}) > 1:
        held = ", ".join(f"rank {rank}: {rows} x {size}" for rank, (rows, size) in enumerate(shapes))
        raise ValueError(f"ranks hold unequal batches of descriptors ({held}); the global loss needs them equal")
    if not len(local_BD):
        raise ValueError("the batch is empty on every rank; the global loss needs at least one image per rank")


def check_one_id_each(local_BD: torch.Tensor, place_ids_B: torch.Tensor) -> None:
    """Raises ValueError on this rank unless there is one place id for each descriptor."""
    if local_BD.ndim != 2 or place_ids_B.shape != local_BD.shape[:1]:
        raise ValueError(
            f"rank {dist.get_rank()}: descriptors {tuple(local_BD.shape)} and place ids {tuple(place_ids_B.shape)}; "
            "expected [B, D] and [B]"
        )
