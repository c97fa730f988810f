"""The process group that everything runs in; one process is a group of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configs.ranks import barrier
from configs.reading import reason
from trainer.devices import rank_device
from trainer.lifeline import end_with_parent
from trainer.one_start import store_of_this_start
from trainer.slurm_step import environment_of_step

CONNECT_S = 60


@dataclass(frozen=True)
class Rank:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks."""
        return self.rank == 0


def rank_and_world_size() -> tuple[int, int]:
    """As torchrun or srun gives them in the environment; a process that neither started becomes a group of one."""
    if "RANK" not in os.environ:
        # Port 0: the system chooses when the store listens. A port looked for before could be another's by then.
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= environment_of_step() or {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def start_process_group(timeout_s: int, *, tf32: bool = False) -> Rank:
    """Joins the group that torchrun or srun describes in the environment, or starts a group of one.

    NCCL on CUDA, one device a local rank; gloo otherwise. A rank that is silent for `timeout_s` ends the job. Without
    `tf32` products of float32, convolutions included, are float32's on a GPU too. Raises ValueError if the rank
    cannot have the device that it was promised (see `rank_device`), ConnectionError if it does not reach the others.
    """
    end_with_parent()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # torch's own are False and True
    rank, world_size = rank_and_world_size()
    device = rank_device()
    store = rank_store(timeout_s)
    if device.type == "cuda":
        dist.init_process_group(
            "nccl",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=bound_device(device, world_size),
        )
    else:
        connect_by_gloo(store, rank, world_size, timeout_s)
    barrier()  # a rank that finds a mistake and ends should find the others in the group, not on their way
    return Rank(dist.get_rank(), dist.get_world_size(), device)


def rank_store(timeout_s: int) -> dist.Store:
    """This start's store, of the ranks that the environment describes, once all are there.

    Raises ConnectionError if that takes longer than `timeout_s`.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    return store_of_this_start(store, "ranks", rank, world_size, timeout_s)


def connect_by_gloo(store: dist.Store, rank: int, world_size: int, timeout_s: int) -> None:
    """Starts a gloo group; each connection has `CONNECT_S`, a collective `timeout_s`. Raises ConnectionError."""
    connect_s = min(timeout_s, CONNECT_S)
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=connect_s)
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank}: a connection to another rank took longer than {connect_s} s ({reason(error)}); "
            "GLOO_SOCKET_IFNAME names the interface that ranks reach each other by"
        ) from error
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch before 2.15
    set_timeout(timedelta(seconds=timeout_s))


def bound_device(device: torch.device, world_size: int) -> torch.device | None:
    """The GPU that a group of several ranks is bound to, so that NCCL connects at once; None for a group of one.

    torch splits each further group off a bound one by ncclCommSplit, which fails in a group of one ("CUDA error 600",
    DeepSpeed issue 8248): DeepSpeed makes such a group, a clone of the whole.
    """
    return device if device.type == "cuda" and world_size > 1 else None


def stop_process_group() -> None:
    """Leaves the group once every rank is done."""
    barrier()
    dist.destroy_process_group()
