"""What ranks agree on: a value that rank 0 finds for all, a fault of one that all raise. Every rank must call these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
USER_ERRORS = (ValueError, OSError)


def from_rank_0(find: Callable[[], T]) -> T:
    """What `find()` returns on rank 0, on every rank; what it raises there is raised everywhere.

    Only rank 0 calls it. Errors other than ValueError and OSError arrive at the others as RuntimeError.
    """
    found: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            found = [(find(), None)]
        except USER_ERRORS as error:
            found = [(None, error)]
        except Exception as error:
            dist.broadcast_object_list([(None, RuntimeError(f"rank 0: {type(error).__name__}: {error}"))])
            raise
    dist.broadcast_object_list(found)
    value, fault = found[0]
    if fault is not None:
        raise fault
    return value  # type: ignore[return-value]


def raise_together(fault: Exception | None) -> None:
    """Raises ValueError on every rank if one of them has a fault, naming the first such rank; waits for all.

    A group of one raises its fault as it is.
    """
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if fault is None else str(fault))
    if fault and len(said) == 1:
        raise fault
    for rank, text in enumerate(said):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}") from fault
