"""The key-value store that the ranks of a launch have in common before any process group is made."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


def open_meeting() -> tuple[int, int]:
    """This process's rank and the world size; a process that torchrun did not start becomes a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def meeting_store(rank: int, world_size: int) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT; rank 0 serves it, unless torchrun's agent does.

    A process group that is made later in the same process shares the server.
    """
    import torch.distributed as dist

    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=120),
        wait_for_workers=False,
        multi_tenant=True,
    )
