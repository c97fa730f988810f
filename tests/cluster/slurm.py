"""A real SLURM on this machine: munged, slurmctld and a slurmd a virtual node, all on loopback, all in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.own_tmp import own_tmp

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
READY_S = 30


def missing_programs() -> list[str]:
    """Programs of Debian's slurmctld, slurmd, slurm-client and munge that are not here."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports of loopback."""
    bases = range(17000, 19000, 50)
    for base in (bases[(os.getpid() + i) % len(bases)] for i in range(len(bases))):  # two sessions differ
        with contextlib.ExitStack() as held:
            try:
                for port in range(base, base + count):
                    probe = held.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError("no free ports from 17000 to 19000")


@dataclass
class Slurm:
    """A running controller with nodes n1, n2, ... of two CPUs; partitions main and, preempting it, high."""

    folder: Path
    nodes: int
    shared: Path | None = None  # of /tmp, what the nodes have in common; None is all
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self, name: str, *command: str) -> None:
        """Starts a daemon in the foreground."""
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self.start(node, *(own_tmp(self.shared) if self.shared else []), "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """A node loses power: SIGKILL to its slurmd and to all its jobs' processes; the controller is told."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    parent = process.parent()
                    process.kill()
                    if parent and parent.name().startswith("slurmstepd"):
                        parent.kill()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def return_node(self, node: str) -> None:
        """The node is back."""
        self.start_node(node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def run(self, *command: str) -> str:
        """Output of one of SLURM's commands; raises with its message if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """What the controller knows of a job, by its own names; of an array's tasks, the last one's."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(number), "--oneliner")))

    def elapsed_s(self, number: int | str) -> int:
        """Seconds that a job has run."""
        hours, minutes, seconds = self.job(number)["RunTime"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def states(self, number: int | str) -> list[str]:
        """States of a job's tasks."""
        return re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", str(number), "--oneliner"))

    def wait(self, number: int | str, state: str, timeout_s: float) -> None:
        """Waits until all tasks of a job are in a state; a final state that is another one raises with the log."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + timeout_s
        while (states := set(self.states(number))) != {state}:
            if states & (final - {state}) or time.monotonic() > deadline:
                raise AssertionError(f"job {number} is {states}, not {state}\n{self.log(number)}")
            time.sleep(0.5)

    def log(self, number: int | str) -> str:
        """What a job printed."""
        path = Path(self.job(number).get("StdOut", ""))
        return path.read_text() if path.is_file() else f"no log at {path}"

    def wait_until_idle(self, timeout_s: float) -> None:
        """Waits until no job has a node."""
        deadline = time.monotonic() + timeout_s
        while self.run("squeue", "-h").strip():
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.2)

    def wait_for(self, number: int | str, found: Callable[[], bool], timeout_s: float) -> None:
        """Waits for something that a running job brings about."""
        deadline = time.monotonic() + timeout_s
        while not found():
            state = self.states(number)
            if set(state) & {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"} or time.monotonic() > deadline:
                raise AssertionError(f"job {number} is {state} before that\n{self.log(number)}")
            time.sleep(0.1)


@contextlib.contextmanager
def slurm(folder: Path, nodes: int, *, like_a_site: Path | None = None) -> Iterator[Slurm]:
    """Starts SLURM in `folder`, which must be new, and kills all that was started, jobs included.

    With `like_a_site` a task may use the cores alone that were asked for it (task/affinity), and each node has a /tmp
    of its own, of which they share that folder.
    """
    if missing := missing_programs():
        raise RuntimeError(f"{', '.join(missing)} not here: apt-get install slurmctld slurmd slurm-client munge")
    for name in ("state", "spool", "log", "munge", "run"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    base = free_ports(nodes + 1)
    (folder / "slurm.conf").write_text(_conf(folder, nodes, base, "task/affinity" if like_a_site else "task/none"))
    made = Slurm(folder, nodes, like_a_site)
    try:
        made.start(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/run/munge.sock"),
            *(f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/log/munged.log"),
            f"--seed-file={folder}/munge/seed",
        )
        _until((folder / "run" / "munge.sock").exists, "munged has no socket", folder)
        made.start("slurmctld", "slurmctld", "-D", "-c")
        for i in range(1, nodes + 1):
            made.start_node(f"n{i}")
        _until(lambda: _idle(made) == nodes, f"{nodes} nodes are not idle", folder)
        yield made
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            for number in made.run("squeue", "-h", "-o", "%A").split():
                made.run("scancel", number)
                made.run("scancel", "--full", "--signal=KILL", number)
            _until(lambda: not made.run("squeue", "-h").strip(), "jobs do not end", folder)
        for process in reversed(made.daemons.values()):
            process.send_signal(signal.SIGTERM)
        for process in made.daemons.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _idle(made: Slurm) -> int:
    try:
        return int(made.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() or 0)
    except RuntimeError:  # the controller does not listen yet
        return 0


def _until(done: Callable[[], bool], otherwise: str, folder: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not done():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}: {log.read_text()[-800:]}" for log in sorted((folder / "log").iterdir()))
            raise RuntimeError(f"{otherwise} after {READY_S} s\n{logs}")
        time.sleep(0.1)


def _conf(folder: Path, nodes: int, base: int, task_plugin: str) -> str:
    host = socket.gethostname()
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={base}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=60
InactiveLimit=0
FirstJobId={base}
JobRequeue=1
SchedulerParameters=sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
SlurmctldParameters=preempt_send_user_signal
NodeName=DEFAULT CPUs=2 CoresPerSocket=2 RealMemory=4000
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{base + 1}-{base + nodes}]
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
