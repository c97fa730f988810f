"""The rendezvous of a launch's nodes: the store that its ranks have in common, and what a node does that is cut off."""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch.distributed import Store

ARRIVE_S = 120


def rendezvous_store(rank: int, world_size: int) -> Store:
    """This start's part of the store at MASTER_ADDR:MASTER_PORT; rank 0 serves it, unless torchrun's agent does.

    Returns once all ranks are there. A process group that is made later in the same process shares the server.
    """
    import torch.distributed as dist

    from trainer.one_start import store_of_this_start

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=ARRIVE_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return store_of_this_start(store, "rerankvpr", rank, world_size, ARRIVE_S)


def end_when_cut_off(host: str, port: int, *, limit_s: float, every_s: float = 5.0) -> None:
    """Watches, from a thread, whether the rendezvous host still answers; after `limit_s` without, ends this process.

    Its ranks are killed first. torchrun's own agent would wait for an answer on a connection that is dead. The watch
    begins with the first answer.
    """

    def watch() -> None:
        answered: float | None = None
        while True:
            began = time.monotonic()
            try:
                socket.create_connection((host, port), timeout=every_s).close()
                answered = time.monotonic()
            except OSError as error:
                if answered is not None and time.monotonic() - answered > limit_s:
                    print(
                        f"rerankvpr: {platform.node()} has not reached {host}:{port} for {limit_s:.0f} s ({error}): it "
                        "ends; run the same command again once the network is back",
                        file=sys.stderr,
                        flush=True,
                    )
                    for rank in psutil.Process().children(recursive=True):
                        rank.kill()
                    os._exit(1)
            time.sleep(max(0.0, began + every_s - time.monotonic()))

    threading.Thread(target=watch, name="rendezvous", daemon=True).start()
