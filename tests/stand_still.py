"""`python -m tests.stand_still RANK FOLDER LIMIT_S [FIRST_LIMIT_S]`: one of two ranks: 0 waits for 1."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.stop_signal import StopSignal
from trainer.watchdog import Watchdog


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    store = dist.FileStore(str(folder / "store"), 2)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    stop = StopSignal()
    limit_s, first_limit_s = float(sys.argv[3]), float((sys.argv[4:] or ["300"])[0])
    watchdog = Watchdog(limit_s=limit_s, first_limit_s=first_limit_s, folder=folder, asked_to_stop=stop.noticed)
    with stop, watchdog:
        (folder / f"ready{rank}").touch()
        watchdog.enter("step", 7)
        while rank == 1 and not (folder / "go").exists():
            time.sleep(0.05)
        dist.all_reduce(torch.zeros(1))  # rank 0 waits here, where no Python handler runs
        print(f"rank {rank} is past it, asked: {bool(stop.name)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
