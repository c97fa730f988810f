"""`rerankvpr doctor`: whether the nodes of a group can train together, and what to do where they cannot.

Ranks exchange plain JSON through the group's key-value store, then measure clocks and the network in a process group of
their own, which is gone when the verb makes its group.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from configs.flags import parse_flags
from launch.facts import Facts, gather_facts, with_feeding
from launch.findings import Checked, Finding, Network, judge_facts, judge_network

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

WAIT_S = 60


@dataclass(frozen=True)
class DoctorCommand:
    """Checks the machines that a training would run on; under `rerankvpr launch` all nodes together.

    rerankvpr launch --nnodes 2 --rdzv node1 -- doctor --shared runs data/shards     (on both nodes)

    Versions, clocks, free disk, folders that all nodes must see, interfaces, latency and bandwidth of an all-reduce,
    GPU memory and errors. The status is 1 if something would stop or spoil a training.
    """

    shared: tuple[Path, ...] = (Path(),)
    """Folders that every node must see as one: outputs and shards."""
    scratch: tuple[Path, ...] = ()
    """Folders that each node has to itself: caches and scratch."""
    images_per_s: float | None = None
    """Images per second that each rank is to take, against which decoding is measured; 3000 for a rank with a GPU."""

    def __post_init__(self) -> None:
        if self.images_per_s is not None and not 0 < self.images_per_s < math.inf:
            raise ValueError(f"--images-per-s {self.images_per_s}: expected a number above 0")


def main(argv: list[str]) -> int:
    """Checks the group that this process is in, alone or under torchrun; rank 0 prints."""
    command = parse_flags(DoctorCommand, argv, prog="rerankvpr doctor")
    from launch.rendezvous import rendezvous_store
    from trainer.process_group import rank_and_world_size

    began = time.monotonic()
    rank, world = rank_and_world_size()
    store = rendezvous_store(rank, world)
    demand = command.images_per_s
    checked = check(store, rank, world, shared=command.shared, scratch=command.scratch, images_per_s=demand)
    if rank == 0:
        for finding in checked.findings:
            print(f"{finding.level:<8} {finding.what}" + (f"\n         -> {finding.remedy}" if finding.remedy else ""))
        print(f"{len(checked.errors)} errors; {time.monotonic() - began:.1f} s", flush=True)
    return 1 if checked.errors else 0


def check(
    store: Store,
    rank: int,
    world: int,
    *,
    shared: Iterable[Path],
    scratch: Iterable[Path],
    quick: bool = False,
    images_per_s: float | None = None,
) -> Checked:
    """Examines all ranks' machines; every rank calls this and gets the same findings. `quick` measures less.

    `images_per_s` is what each rank is to take; without it IMAGES_PER_GPU_S of one with a GPU.
    """
    import torch.distributed as dist

    store = dist.PrefixStore("rerankvpr/doctor", store)
    shared, scratch = [path.absolute() for path in shared], [path.absolute() for path in scratch]
    tokens = _leave_tokens(store, rank, shared)
    try:
        facts = gather_facts(rank, shared, scratch, tokens)
        if not quick:
            facts = with_feeding(facts, images_per_s)
        found, all_facts = _judged_by_rank_0(store, rank, world, facts)
    finally:
        for token in tokens.values() if rank == 0 else ():
            token.unlink(missing_ok=True)
    if any(finding.level == "error" for finding in found):  # of such machines a network test may hang
        return Checked(found)
    network = measure_network(store, rank, world, quick=quick)
    of_network = judge_network(all_facts, network) if rank == 0 else []
    return Checked(found + _from_rank_0(store, "network", rank, world, of_network))


def _judged_by_rank_0(store: Store, rank: int, world: int, facts: Facts) -> tuple[list[Finding], list[Facts]]:
    """Findings on the facts of all ranks, equal on every rank, and on rank 0 those facts."""
    store.set(f"facts/{rank}", json.dumps(asdict(facts)))
    if rank:
        return _from_rank_0(store, "facts", rank, world, []), []
    everyone = [Facts(**json.loads(_get(store, f"facts/{i}", f"rank {i}"))) for i in range(world)]
    return _from_rank_0(store, "facts", rank, world, judge_facts(everyone)), everyone


def _from_rank_0(store: Store, name: str, rank: int, world: int, findings: list[Finding]) -> list[Finding]:
    """Rank 0's findings, on every rank; rank 0 serves the store, so it stays until they have been read."""
    if rank == 0:
        store.set(f"findings/{name}", json.dumps([asdict(finding) for finding in findings]))
        for i in range(1, world):
            _get(store, f"read/{name}/{i}", f"rank {i}")
        return findings
    found = [Finding(**one) for one in json.loads(_get(store, f"findings/{name}", "rank 0"))]
    store.set(f"read/{name}/{rank}", "read")
    return found


def _get(store: Store, key: str, who: str) -> bytes:
    import torch.distributed as dist

    try:
        store.wait([key], timedelta(seconds=WAIT_S))
        return bytes(store.get(key))
    except dist.DistError as error:
        raise ValueError(f"doctor: {who} did not answer within {WAIT_S} s; look at that node's log") from error


def _leave_tokens(store: Store, rank: int, shared: list[Path]) -> dict[str, Path]:
    """A file of rank 0 in each shared folder that it may write to; by folder, on every rank."""
    if rank == 0:
        left = {}
        for folder in shared:
            token = folder / f".rerankvpr-{os.getpid()}-{time.time_ns()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                token.touch()
            except OSError:
                continue
            left[str(folder)] = token
        store.set("tokens", json.dumps({folder: str(token) for folder, token in left.items()}))
        return left
    return {folder: Path(token) for folder, token in json.loads(_get(store, "tokens", "rank 0")).items()}


def measure_network(store: Store, rank: int, world: int, *, quick: bool) -> Network:
    """Clock offsets, latency and bandwidth over all ranks, in a process group that is gone afterwards.

    Raises ValueError if the ranks cannot reach each other.
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=WAIT_S),
        )
        offsets = _clock_offsets(rank, world, device)
        latency = statistics.median(_all_reduce_s(1, device, 5 if quick else 20))
        numbers = (2**24 if cuda else 2**20) // (4 if quick else 1)
        seconds = statistics.median(_all_reduce_s(numbers, device, 3 if quick else 7))
        dist.destroy_process_group()
    except RuntimeError as error:
        interface = os.environ.get("NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME", "none chosen")
        raise ValueError(
            f"doctor: rank {rank} on {platform.node()} cannot reach the others (interface {interface}): "
            f"{str(error).splitlines()[0]}; open the ports between the nodes, or name another interface in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    sent = 4 * numbers * 2 * (world - 1) / world / 2**20
    return Network(offsets, latency * 1000, sent / seconds)


def _clock_offsets(rank: int, world: int, device: torch.device) -> list[float]:
    """Seconds that each rank's clock is ahead of rank 0's, to within the end of a barrier; the least of five."""
    import torch
    import torch.distributed as dist

    from configs.ranks import barrier

    rounds = []
    for _ in range(5):
        barrier()
        clocks = torch.zeros(world, dtype=torch.float64, device=device)
        clocks[rank] = time.time()
        dist.all_reduce(clocks)
        rounds.append((clocks - clocks[0]).tolist())
    return [min((one[i] for one in rounds), key=abs) for i in range(world)]


def _all_reduce_s(numbers: int, device: torch.device, times: int) -> list[float]:
    import torch
    import torch.distributed as dist

    x = torch.ones(numbers, device=device)
    seconds = []
    for i in range(times + 1):
        began = time.perf_counter()
        dist.all_reduce(x)
        x[0].item()  # waits for a GPU
        if i:  # the first connects
            seconds.append(time.perf_counter() - began)
        x.fill_(1.0)
    return seconds
