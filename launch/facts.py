"""What a rank knows of its machine: versions, folders, cores, limits and its GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.node import IMAGES_PER_GPU_S
from trainer.routes import has_infiniband

PACKAGES = ("torch", "deepspeed", "numpy", "faiss-gpu", "faiss-cpu", "timm", "mlflow", "pyarrow", "safetensors")
SOURCES = ("configs", "data_pipeline", "model", "memory", "trainer", "eval", "launch")
IMAGE_SIZE = 224
NVIDIA_SMI_S = 30.0  # without its persistence daemon the driver takes seconds for each GPU


@dataclass(frozen=True)
class Facts:
    """What a rank knows about its machine."""

    rank: int
    host: str
    node: int  # torchrun's number of the node
    interface: str
    versions: dict[str, str]
    free_gb: dict[str, float]
    not_seen: list[str]
    cores: list[int] = field(default_factory=list)  # that this rank may use
    cores_of_host: int = 0
    shm_free_gb: float = 0.0
    memlock_gb: float | None = None  # that a process may lock; None is no limit
    infiniband: bool = False
    visible_gpus: str = ""  # CUDA_VISIBLE_DEVICES
    no_gpu_because: str = ""  # why a GPU that is promised cannot be used
    no_gpu_remedy: str = ""
    gpu: str = ""
    gpu_uuid: str = ""
    gpu_free_gb: float = 0.0
    gpu_total_gb: float = 0.0
    gpu_errors: int = 0
    gpu_note: str = ""  # what could not be asked of it
    images_per_s: float = 0.0  # that this rank is to take; 0 where nobody said
    core_images_per_s: float = 0.0  # that a core decodes, if images_per_s is known
    image_bytes: float = 0.0  # of those that were decoded


def gather_facts(rank: int, shared: list[Path], scratch: list[Path], tokens: dict[str, Path]) -> Facts:
    """What this rank sees of its machine; of `tokens`, files of rank 0's by their folder, each is looked for."""
    from eval.scratch import is_seen

    not_seen = [str(folder) for folder in shared if not is_seen(tokens.get(str(folder), folder))]
    free = {}
    for folder in (*shared, *scratch):
        there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
        free[str(folder)] = shutil.disk_usage(there).free / 2**30
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Facts(
        rank=rank,
        host=platform.node(),
        node=int(os.environ.get("GROUP_RANK", "0")),
        interface=os.environ.get("GLOO_SOCKET_IFNAME", "") or "gloo's own choice",
        versions=versions(),
        free_gb=free,
        not_seen=not_seen,
        cores=sorted(os.sched_getaffinity(0)),
        cores_of_host=os.cpu_count() or 0,
        shm_free_gb=shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else 0.0,
        memlock_gb=None if locked == resource.RLIM_INFINITY else locked / 2**30,
        infiniband=has_infiniband(),
        visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        **_gpu(),
    )


def with_feeding(facts: Facts, images_per_s: float | None) -> Facts:
    """The facts with what a core decodes, measured in a moment, if it is known how many images a rank is to take."""
    demand = images_per_s or (IMAGES_PER_GPU_S if facts.gpu else 0.0)
    if not demand:
        return facts
    from data_pipeline.decode_cost import example_jpegs, images_per_core_second

    jpegs = example_jpegs()
    num_bytes = sum(map(len, jpegs)) / len(jpegs)
    rate = images_per_core_second(jpegs, IMAGE_SIZE)
    return replace(facts, images_per_s=demand, core_images_per_s=rate, image_bytes=num_bytes)


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
        digest.update(str(file.relative_to(home)).encode() + file.read_bytes())
    return found | {"rerankvpr": digest.hexdigest()[:12]}


def _gpu() -> dict[str, Any]:
    """This rank's GPU, or why there is none although one is promised."""
    import torch

    from trainer.devices import REMEDY, why_no_gpu

    if reason := why_no_gpu():
        return {"no_gpu_because": reason, "no_gpu_remedy": REMEDY}
    if not torch.cuda.is_available():
        return {}
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        reason = f"local rank {index} has no GPU: the node shows {count}"
        return {"no_gpu_because": reason, "no_gpu_remedy": "start at most that many processes on a node"}
    free, total = torch.cuda.mem_get_info(index)
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    errors, note = memory_errors(uuid)
    return {
        "gpu": torch.cuda.get_device_name(index),
        "gpu_uuid": uuid,
        "gpu_free_gb": free / 2**30,
        "gpu_total_gb": total / 2**30,
        "gpu_errors": errors,
        "gpu_note": note,
    }


def memory_errors(uuid: str) -> tuple[int, str]:
    """Uncorrected memory errors that nvidia-smi counts of a GPU, and a note where it does not answer.

    A GPU is asked for by its UUID: nvidia-smi numbers all GPUs of the node, torch those of CUDA_VISIBLE_DEVICES.
    """
    if not shutil.which("nvidia-smi"):
        return 0, ""
    asked = ["nvidia-smi", f"--id={uuid}", "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_S)
    except subprocess.TimeoutExpired:
        return 0, f"nvidia-smi does not answer within {NVIDIA_SMI_S:g} s"
    except OSError as error:
        return 0, f"nvidia-smi cannot be run ({error})"
    said = done.stdout.strip()
    if done.returncode:
        return 0, f"nvidia-smi ends with status {done.returncode}: {(said or done.stderr.strip())[:80]}"
    return (int(said) if said.isdigit() else 0), ""
