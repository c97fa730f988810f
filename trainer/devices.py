"""Which device a rank computes on: its GPU, or the CPU where nothing promises one."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

HIDDEN = ("", "-1", "NoDevFiles")  # the last is SLURM's, for a job without GPUs on a node that has some
SLURM_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# By controller as OWN_CGROUPS has it, of version 2 and of version 1: the folder of all groups, and the file of a limit.
CGROUP_LIMITS = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}
GB = 10**9


def promised_gpu() -> str:
    """What says that this process has a GPU: a device file that opens, or a variable of SLURM; empty if nothing does.

    An empty CUDA_VISIBLE_DEVICES, or -1, chooses the CPU. A device file that does not open belongs to another job.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return ""
    for name in SLURM_GPUS:
        if os.environ.get(name, "0") not in ("", "0"):
            return f"{name}={os.environ[name]}"
    for path in sorted(Path("/dev").glob("nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError:
            continue
        return str(path)
    return ""


def why_no_gpu() -> str:
    """Why a promised GPU cannot be used, in one line; empty where torch has one, or where none is promised."""
    promise = promised_gpu()
    if not promise or torch.cuda.is_available():
        return ""
    reason = "it was built without CUDA"
    if torch.backends.cuda.is_built() or torch.version.hip:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.cuda.init()
            reason = "it counts 0 devices"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
    return f"{promise} promises a GPU, and torch {torch.__version__} finds none: {reason}"


REMEDY = "install a torch built for this driver, or set CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"


def rank_device() -> torch.device:
    """The device of this process's local rank, made the current one if it is a GPU.

    Raises ValueError if a GPU is promised and cannot be used, or if the node has fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        if reason := why_no_gpu():
            raise ValueError(f"{reason}; {REMEDY}")
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start at most that many processes on a node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def memory_bytes(device: torch.device) -> int:
    """Bytes of a device's memory; on a CPU the machine's, or those of a cgroup (a container, a SLURM job) if less."""
    return _memory(device)[0]


def _memory(device: torch.device) -> tuple[int, str]:
    """`memory_bytes`, and what has them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], "on a GPU that"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = []
    for file in _cgroup_limits():
        with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
            limits.append(int(file.read_text()))
    group = min(limits, default=machine)
    return (group, "in a container or job (cgroup) that") if group < machine else (machine, "on a machine that")


def _cgroup_limits() -> Iterator[Path]:
    """Files with the limits of this process's cgroups and of those around them; in a container some are not there."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, controllers, own = line.split(":", 2)
        for controller in {*controllers.split(",")} & CGROUP_LIMITS.keys():
            folder, file = CGROUP_LIMITS[controller]
            root = CGROUPS / folder
            group = root / own.lstrip("/")
            yield from (around / file for around in (group, *group.parents) if around.is_relative_to(root))


def check_room(what: str, num_bytes: int, device: torch.device) -> None:
    """Raises ValueError if `what`, a key and its value, takes more than a device's memory: no rank could hold it."""
    room, where = _memory(device)
    if num_bytes > room:
        raise ValueError(f"{what}: takes {_shown(num_bytes)} GB of a rank, {where} has {_shown(room)}; give less")


def _shown(num_bytes: int) -> str:
    """Bytes in GB with one decimal, also of a number that no float holds."""
    return f"{num_bytes // GB:,}.{num_bytes % GB * 10 // GB}"
