"""`rerankvpr doctor`: whether the nodes of a group can train together, and what to do where they cannot.

Ranks exchange plain JSON through the group's key-value store, then measure clocks and the network in a process group of
their own, which is gone when the verb makes its group.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from launch.findings import Checked, Facts, Finding, Network, judge

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

PACKAGES = ("torch", "deepspeed", "numpy", "faiss-gpu", "faiss-cpu", "timm", "mlflow", "pyarrow", "safetensors")
SOURCES = ("configs", "data_pipeline", "model", "memory", "trainer", "eval", "launch")
WAIT_S = 60


@dataclass(frozen=True)
class DoctorCommand:
    """Checks the machines that a training would run on; under `rerankvpr launch` all nodes together.

    rerankvpr launch --nnodes 2 --rdzv node1 -- doctor --shared runs data/shards     (on both nodes)

    Versions, clocks, free disk, folders that all nodes must see, interfaces, latency and bandwidth of an all-reduce,
    GPU memory and errors. The status is 1 where something would stop or spoil a training.
    """

    shared: tuple[Path, ...] = (Path(),)
    """Folders that every node must see as one: outputs and shards."""
    scratch: tuple[Path, ...] = ()
    """Folders that each node has to itself: caches and scratch."""


def main(argv: list[str]) -> int:
    """Checks the group that this process is in, alone or under torchrun; rank 0 prints."""
    command = tyro.cli(DoctorCommand, args=argv, prog="rerankvpr doctor")
    from launch.rendezvous import rendezvous_store
    from trainer.process_group import rank_and_world_size

    began = time.monotonic()
    rank, world = rank_and_world_size()
    checked = check(rendezvous_store(rank, world), rank, world, shared=command.shared, scratch=command.scratch)
    if rank == 0:
        for finding in checked.findings:
            print(f"{finding.level:<8} {finding.what}" + (f"\n         -> {finding.remedy}" if finding.remedy else ""))
        print(f"{len(checked.errors)} errors; {time.monotonic() - began:.1f} s", flush=True)
    return 1 if checked.errors else 0


def check(
    store: Store, rank: int, world: int, *, shared: Iterable[Path], scratch: Iterable[Path], quick: bool = False
) -> Checked:
    """Examines all ranks' machines; every rank calls this and gets the same findings. `quick` measures less."""
    import torch.distributed as dist

    store = dist.PrefixStore("rerankvpr/doctor", store)
    shared, scratch = [path.absolute() for path in shared], [path.absolute() for path in scratch]
    tokens = _leave_tokens(store, rank, shared)
    try:
        facts = gather_facts(rank, shared, scratch, tokens)
        store.set(f"facts/{rank}", json.dumps(asdict(facts)))
        all_facts = (
            [Facts(**json.loads(_get(store, f"facts/{i}", f"rank {i}"))) for i in range(world)] if not rank else []
        )
        network = measure_network(store, rank, world, quick=quick)
    finally:
        for token in tokens.values() if rank == 0 else ():
            token.unlink(missing_ok=True)
    if rank == 0:
        found = judge(all_facts, network)
        store.set("findings", json.dumps([asdict(finding) for finding in found]))
        for i in range(1, world):  # this rank serves the store
            _get(store, f"read/{i}", f"rank {i}")
        return Checked(found)
    found = [Finding(**one) for one in json.loads(_get(store, "findings", "rank 0"))]
    store.set(f"read/{rank}", "read")
    return Checked(found)


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


def gather_facts(rank: int, shared: list[Path], scratch: list[Path], tokens: dict[str, Path]) -> Facts:
    """What this rank sees of its machine."""
    from eval.scratch import is_seen

    not_seen = [str(folder) for folder in shared if not is_seen(tokens.get(str(folder), folder))]
    free = {}
    for folder in (*shared, *scratch):
        there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
        free[str(folder)] = shutil.disk_usage(there).free / 2**30
    return Facts(
        rank=rank,
        host=platform.node(),
        node=int(os.environ.get("GROUP_RANK", "0")),
        interface=os.environ.get("GLOO_SOCKET_IFNAME", "") or "gloo's own choice",
        versions=versions(),
        free_gb=free,
        not_seen=not_seen,
        **_gpu(),
    )


def versions() -> dict[str, str]:
    """Versions of what ranks must agree on, and a digest of this project's sources."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    digest = hashlib.sha256()
    home = Path(__file__).resolve().parent.parent
    for file in sorted(file for folder in SOURCES for file in (home / folder).rglob("*.py")):
        digest.update(file.relative_to(home).as_posix().encode() + file.read_bytes())
    return found | {"rerankvpr": digest.hexdigest()[:12]}


def _gpu() -> dict[str, Any]:
    """Memory of this rank's GPU and its uncorrected memory errors, as nvidia-smi counts them."""
    import torch

    if not torch.cuda.is_available():
        return {}
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(index)
    errors = 0
    if shutil.which("nvidia-smi"):
        asked = [
            "nvidia-smi",
            f"--id={index}",
            "--query-gpu=ecc.errors.uncorrected.volatile.total",
            "--format=csv,noheader",
        ]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
        errors = int(said) if said.isdigit() else 0
    name = torch.cuda.get_device_name(index)
    return {"gpu": name, "gpu_free_gb": free / 2**30, "gpu_total_gb": total / 2**30, "gpu_errors": errors}


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

    rounds = []
    for _ in range(5):
        dist.barrier()
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
