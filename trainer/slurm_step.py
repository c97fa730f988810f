"""A process that plain `srun` started, without torchrun: its place in the group, from SLURM's variables."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess

from trainer.devices import HIDDEN
from trainer.routes import has_infiniband, interface_environment, route_to


def environment_of_step() -> dict[str, str]:
    """What torchrun would set for this task of an srun step of several tasks; empty outside of one.

    MASTER_ADDR and MASTER_PORT stay as they are where they are set. Raises ValueError where the first node's address
    cannot be found.
    """
    step = os.environ
    tasks = int(step.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "SLURM_PROCID" not in step:
        return {}
    address = step.get("MASTER_ADDR") or address_of(first_host(step["SLURM_STEP_NODELIST"]))
    job, number = int(step["SLURM_JOB_ID"]), int(step.get("SLURM_STEP_ID", "0"))
    visible = step.get("CUDA_VISIBLE_DEVICES", "")
    own_gpu = visible not in HIDDEN and "," not in visible  # --gpus-per-task: each task sees its own, as number 0
    found = {
        "RANK": step["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if own_gpu else step["SLURM_LOCALID"],
        "GROUP_RANK": step["SLURM_NODEID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": step.get("MASTER_PORT") or str(20000 + (7 * job + number) % 10000),
    }
    interfaces = interface_environment(route_to(address).interface, infiniband=has_infiniband())
    return found | {name: value for name, value in interfaces.items() if name not in step}


def first_host(nodelist: str) -> str:
    """The first host name of SLURM's list, such as `n07` of `n[07-09,12],m3`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodelist)


def address_of(host: str) -> str:
    """A host name that resolves here as it is, else the address that SLURM's controller knows it by."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        if shutil.which("scontrol"):
            said = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
            if known := re.search(r"NodeAddr=(\S+)", said.stdout):
                return known[1]
        raise ValueError(f"SLURM's first node, {host}, is unknown here; set MASTER_ADDR to its address") from None
    return host
