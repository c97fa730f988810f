"""What a training ran on and with: commit, versions, devices."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from configs.secrets import without_secrets
from trainer.stop_signal import COMMAND

PACKAGES = ("torch", "deepspeed", "timm", "faiss-gpu", "faiss-cpu", "mlflow", "pyarrow", "pytorch-metric-learning")
HOME = Path(__file__).resolve().parent.parent


def provenance(*, world_size: int, device: torch.device, data_digest: str = "") -> dict[str, str]:
    """Flat facts of this process's environment: git commit, versions, hosts and devices. No environment variables.

    The commit is that of the checkout this package is imported from; it is left out where that is none.
    `data_digest` is the digest of the shard sets' indexes, as `data.digest`.
    """
    facts = _git(HOME) | {"version.python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[f"version.{name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if data_digest:
        facts["data.digest"] = data_digest
    return facts | {
        "host": socket.gethostname(),
        "hosts": os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or "1",
        "world_size": str(world_size),
        "devices": _devices(device),
    }


def how_made(*, world_size: int, device: torch.device, data_digest: str = "") -> dict[str, str]:
    """The command that this process runs, without secrets, and `provenance`."""
    command = {"command": without_secrets(os.environ[COMMAND])} if os.environ.get(COMMAND) else {}
    return command | provenance(world_size=world_size, device=device, data_digest=data_digest)


def _git(folder: Path) -> dict[str, str]:
    """Commit and state of the checkout whose root is `folder`; empty where there is none, or no git."""
    if not (folder / ".git").exists():
        return {}
    try:
        commit = _run(folder, "git", "rev-parse", "HEAD")
        changes = _run(folder, "git", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower()}


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _devices(device: torch.device) -> str:
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{os.cpu_count()} x {model}"
