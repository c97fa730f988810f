"""`rerankvpr rank`: one process of a launch on several nodes.

`launch` starts it; it checks the nodes, then runs a verb. With `--fit` a training takes the largest number of ranks
that its places_per_batch is divisible by, and the ranks beyond it wait: a node that is lost or comes back does not end
a training whose batch the rest does not divide.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from configs.flags import parse_flags
from launch.stages import split_at_dashes
from trainer.lifeline import end_with_parent

if TYPE_CHECKING:
    from torch.distributed import Store

ENDED = "rerankvpr/ended"
ACKNOWLEDGE_S = 30


@dataclass(frozen=True)
class RankCommand:
    """One process of a launch on several nodes; `rerankvpr launch` starts it under torchrun as `rank -- VERB ...`.

    It checks the nodes (the short form of `rerankvpr doctor`), then runs VERB.
    """

    fit: bool = False
    """A training uses as many ranks as its batch is divisible by."""


def main(argv: list[str]) -> int:
    """Runs a verb as one rank of a group that torchrun describes in the environment."""
    flags, command = split_at_dashes(argv)
    ours = parse_flags(RankCommand, flags, prog="rerankvpr rank")
    if not command:
        raise ValueError("rank needs a verb after `--`: rerankvpr rank -- train RECIPE")
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("rank is started by `rerankvpr launch`, not by hand")
    end_with_parent()
    from launch.cli import main as run
    from launch.doctor import check
    from launch.findings import complain
    from launch.rendezvous import rendezvous_store

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    used = world
    shared: list[Path] = []
    scratch: list[Path] = []
    if command[0] == "train" and not {"-h", "--help"} & set(command):
        from trainer.command import parse

        recipe = parse(command[1:]).recipe  # a mistake in it is reported before anything starts
        used = fitting_world(recipe.data.places_per_batch, world) if ours.fit else world
        shared = [recipe.output, *([recipe.eval.features] if recipe.eval.features else [])]
        scratch = [recipe.data.cache] if recipe.data.cache else []
    elif command[0] == "eval" and not {"-h", "--help", "--list"} & set(command):
        from launch.eval_command import parse as parse_eval

        evaluation, _, _ = parse_eval(command[1:])
        shared = [folder for folder in (evaluation.out, evaluation.eval.features) if folder]
    elif command[0] == "index" and not {"-h", "--help"} & set(command):
        from launch.index_command import written_folder

        shared = [folder for folder in (written_folder(command[1:]),) if folder]
    store = rendezvous_store(rank, world)
    complain(check(store, rank, world, shared=shared, scratch=scratch, quick=True), aloud=rank == 0)
    if used == world:
        return run(command)
    if rank >= used:
        return wait_for_the_end(store, rank)
    if rank == 0:
        print(f"{used} of {world} ranks train: places_per_batch is divisible by no number between", flush=True)
    os.environ["WORLD_SIZE"] = str(used)
    status = run(command)
    if rank == 0:
        release(store, status, range(used, world))
    return status


def fitting_world(places_per_batch: int, world_size: int) -> int:
    """The largest number of ranks, at most `world_size`, that a global batch of P places is divisible by."""
    return next(size for size in range(min(places_per_batch, world_size), 0, -1) if places_per_batch % size == 0)


def wait_for_the_end(store: Store, rank: int) -> int:
    """Waits for the end of a training that this rank is not needed in, and ends as it did."""
    import torch.distributed as dist

    print(f"rank {rank} waits: the batch is not divisible by one rank more", flush=True)
    while True:
        try:
            store.wait([ENDED], timedelta(minutes=10))
        except dist.DistNetworkError:
            print(f"rerankvpr: rank {rank}, waiting: rank 0 is gone", file=sys.stderr, flush=True)
            return 1
        except dist.DistStoreError:  # not yet
            continue
        status = int(store.get(ENDED))
        store.set(f"{ENDED}/{rank}", "seen")
        return status


def release(store: Store, status: int, waiting: range) -> None:
    """Tells waiting ranks how the training ended; this rank serves the store, so it stays until they have read it."""
    import torch.distributed as dist

    store.set(ENDED, str(status))
    try:
        store.wait([f"{ENDED}/{rank}" for rank in waiting], timedelta(seconds=ACKNOWLEDGE_S))
    except dist.DistStoreError:
        print(f"rerankvpr: not all of the waiting ranks {[*waiting]} answered", file=sys.stderr, flush=True)
