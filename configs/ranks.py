"""What ranks agree on: a value that rank 0 finds for all, a fault of one that all raise. Every rank must call these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from configs.reading import said_by

T = TypeVar("T")
USER_ERRORS = (ValueError, OSError, SafetensorError)


def barrier() -> None:
    """Waits for every rank. NCCL gets this rank's GPU, since it would guess one and warn."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def from_rank_0(find: Callable[[], T]) -> T:
    """What `find()` returns on rank 0, on every rank; what it raises there is raised everywhere.

    Only rank 0 calls it. Errors that are not of USER_ERRORS arrive at the others as RuntimeError.
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


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """Local work of every rank, without a collective inside; an error of any kind on one rank ends it on all.

    What `raise_together` raises, once all ranks have ended the work.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait
        fault = error
    raise_together(fault)


def raise_together(fault: Exception | None) -> None:
    """Raises ValueError on every rank if one of them has a fault, naming the first such rank; waits for all.

    A group of one raises its fault as it is. So does a rank whose fault is not the user's, such as a GPU out of
    memory: the others name its kind.
    """
    if dist.get_world_size() == 1:
        if fault:
            raise fault
        return
    is_users = isinstance(fault, USER_ERRORS)
    mine = None if fault is None else said_by(fault) if is_users else f"{type(fault).__name__}: {fault}"
    said: list[str | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(said, mine)
    except RuntimeError as error:  # the fault broke the group too, as an error of CUDA does
        if fault:
            raise fault from error
        raise
    if fault and not is_users:
        raise fault
    for rank, text in enumerate(said):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}") from fault


def same_on_all_ranks(what: str, value: str) -> None:
    """Raises ValueError on every rank, naming the first whose value is not rank 0's."""
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, found in enumerate(values):
        if found != values[0]:
            raise ValueError(f"{what}: rank {rank} has {found}, rank 0 {values[0]}")
