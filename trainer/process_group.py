"""The process group that everything runs in; one process is a group of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.ports import free_port


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
    """As torchrun or SLURM gives them in the environment; a process that neither started becomes a group of one."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {**alone, "MASTER_PORT": str(free_port())}
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def start_process_group(timeout_s: int) -> Rank:
    """Joins the group that torchrun or SLURM describes in the environment, or starts a group of one.

    NCCL on CUDA, one device a local rank; gloo otherwise. A rank that is silent for `timeout_s` ends the job.
    """
    rank_and_world_size()
    cuda = torch.cuda.is_available()
    if cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
                "start at most that many processes on a node"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), device_id=device if cuda else None
    )
    dist.barrier()  # a rank that finds a mistake and ends should find the others in the group, not on their way
    return Rank(dist.get_rank(), dist.get_world_size(), device)


def stop_process_group() -> None:
    """Leaves the group once every rank is done."""
    dist.barrier()
    dist.destroy_process_group()
