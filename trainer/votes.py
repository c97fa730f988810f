"""What ranks tell each other in every step, by one all-reduce: bad images, requests to stop, written checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.batches import Batches
from trainer.saving import Saving
from trainer.stop_signal import StopSignal


@dataclass(frozen=True)
class Votes:
    """The same on every rank."""

    bad_images: int  # met by all ranks since this process started
    asked_to_stop: bool  # whether any rank was
    save_is_due: bool  # by the clock of rank 0


def exchange_votes(batches: Batches, stop_signal: StopSignal, saving: Saving, device: torch.device) -> Votes:
    """The sums over ranks; a checkpoint that all ranks have written becomes valid. Every rank must call this."""
    mine = [batches.num_bad_images, bool(stop_signal.name), saving.is_due_by_time(), *saving.writer.vote()]
    sums = torch.tensor(mine, dtype=torch.float32, device=device)
    dist.all_reduce(sums)
    bad_images, asked_to_stop, save_is_due, written, failed = sums.tolist()
    saving.settle(written, failed)
    return Votes(int(bad_images), asked_to_stop > 0, save_is_due > 0)
