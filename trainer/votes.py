"""What ranks tell each other in every step, by one all-reduce: bad images, requests to stop, written checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.batches import Batches
from trainer.saving import Saving
from trainer.stop_signal import StopSignal


@dataclass(frozen=True)
class Votes:
    """The same on every rank."""

    bad_images: int  # met by all ranks since this process started
    asked_to_stop: bool  # whether any rank was
    save_is_due: bool  # by the clock of rank 0


def votes_of_rank(batches: Batches, stop_signal: StopSignal, saving: Saving) -> list[float]:
    """This rank's, for all ranks to add up."""
    return [batches.num_bad_images, bool(stop_signal.name), saving.is_due_by_time(), *saving.writer.vote()]


def settle_votes(sums: Sequence[float], saving: Saving) -> Votes:
    """What the sums over ranks mean; a checkpoint that all ranks have written becomes valid."""
    bad_images, asked_to_stop, save_is_due, written, failed = sums
    saving.settle(written, failed)
    return Votes(int(bad_images), asked_to_stop > 0, save_is_due > 0)
