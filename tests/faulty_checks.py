"""Checks that go wrong, for the test of the groups of ranks."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def check_that_passes() -> None:
    dist.barrier()


def check_that_fails_on_one_rank() -> None:
    """The other waits for it in a collective."""
    print("said before it failed")
    assert dist.get_rank() == 0, "rank 1 is not rank 0"
    dist.all_reduce(torch.ones(1))


def check_that_hangs_on_one_rank() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def check_that_ends_its_process() -> None:
    os._exit(7)
