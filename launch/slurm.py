"""SLURM batch scripts as text: what a stage of a submission asks for, and what its job does."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trainer.stop_signal import REQUEUE_STATUS

LAST_S = 60  # from the end of the first node's task to that of the last, before Slurm ends the rest


@dataclass(frozen=True)
class Resources:
    """What a stage of a submission asks SLURM for."""

    nodes: str = "1"
    """Nodes, or MIN-MAX: whatever is free in that range at each start, the same batch on all of it."""
    gpus_per_node: int = 0
    """GPUs of each node, and so processes; 0 is a CPU node."""
    nproc_per_node: str = "auto"
    """Processes on each node; auto is one a GPU, or one where there is none."""
    cpus_per_task: int = 0
    """Cores of each node; 0 leaves it to the site."""
    mem: str = ""
    """Memory of each node, as SLURM writes it (120G)."""
    time: str = ""
    """Time limit, as SLURM writes it (12:00:00, 2-00:00:00)."""
    partition: str = ""
    """Partition."""
    account: str = ""
    """Account."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features of nodes."""
    container_image: str = ""
    """Image that the job's processes run in (srun's --container-image, by pyxis)."""
    container_mounts: str = ""
    """Mounts of the image."""
    setup: tuple[str, ...] = ()
    """Lines of shell that the job starts with, such as 'module load cuda'."""
    python: str = ""
    """Python of the environment on the nodes, or in the image; this command's own without it."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, without their dashes, such as exclusive or reservation=NAME."""
    signal_s: int = 120
    """Seconds before the time limit at which a training is told to save."""
    max_requeues: int = 20
    """Times that a job is put back in the queue after it saved; beyond that it ends with status 75."""
    array: int = 0
    """Tasks of a `shard` or `index` stage, each with its part of the work; a further job then makes the whole of it."""
    dependency: str = ""
    """What the first stage waits for, as SLURM writes it (afterok:1234)."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints the scripts and submits nothing."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes):
            raise ValueError(f"--nodes {self.nodes}: expected a number or MIN-MAX, such as 4 or 2-4")
        if self.nproc_per_node != "auto" and not re.fullmatch(r"[1-9][0-9]*", self.nproc_per_node):
            raise ValueError(f"--nproc-per-node {self.nproc_per_node!r}: expected auto or a number, 1 or more")
        for name in ("gpus_per_node", "cpus_per_task", "signal_s", "max_requeues", "array"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        for flag in ("mem", "time", "partition", "account", "qos", "constraint", "dependency"):
            if re.search(r"\s", getattr(self, flag)):
                raise ValueError(f"--{flag} {getattr(self, flag)!r}: one word is expected")
        for option in self.sbatch:
            _directive(option, "--sbatch")
        if self.python.startswith("-"):
            raise ValueError(f"--python {self.python!r}: expected the path of a Python, which does not start with '-'")

    @property
    def node_range(self) -> tuple[int, int]:
        """Least and most nodes."""
        low, _, high = self.nodes.partition("-")
        return int(low), int(high or low)

    @property
    def processes_per_node(self) -> int:
        """Processes that each node runs."""
        return (self.gpus_per_node or 1) if self.nproc_per_node == "auto" else int(self.nproc_per_node)

    @property
    def ranks(self) -> int | None:
        """Processes on all nodes; None for a range of nodes."""
        low, high = self.node_range
        return low * self.processes_per_node if low == high else None


@dataclass(frozen=True)
class Job:
    """One sbatch script: its name (a file's and SLURM's), the folder it is kept in, its text."""

    name: str
    folder: Path
    text: str
    is_array: bool = False
    note: str = ""  # what else a person should know of it

    @property
    def script(self) -> Path:
        """The file it is kept in."""
        return self.folder / f"{self.name}.sbatch"

    @property
    def log(self) -> Path:
        """Where SLURM writes what the job prints; %-patterns are SLURM's."""
        pattern = f"{self.name}-{'%A_%a' if self.is_array else '%j'}.log"
        return Path(str(self.folder).replace("%", "%%")) / pattern


def torchrun_job(name: str, folder: Path, verb: list[str], want: Resources, *, python: str, cwd: Path) -> Job:
    """A job of one torchrun agent a node that meet on the first node; it saves, requeues and resumes.

    USR1 comes from SLURM before the time limit and on preemption, and a training that saved ends with status 75.
    """
    low, high = want.node_range
    nnodes = '"$SLURM_NNODES"' if low == high else f'{low}:"$SLURM_NNODES"'
    program = f"{_words([want.python or python])} -m rerankvpr"
    launch = [
        f"{program} launch --nnodes {nnodes} --nproc-per-node {want.processes_per_node}",
        '--rdzv "$address:$port" --rdzv-id "$SLURM_JOB_ID.$restarts" --max-restarts 3',
        f"-- {_words(verb)}",
    ]
    # All save and end with 75, some a little later than the first, which --kill-on-bad-exit would not let them.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={LAST_S if low == high else 0}", "--ntasks-per-node=1"]
    srun += [*core_flags(want), *container_flags(want)]
    # No ntasks-per-node here: of a range of nodes sbatch would then ask for the least, and get no more.
    options = [f"nodes={want.nodes}", *resource_options(want), f"signal=USR1@{want.signal_s}", "requeue"]
    text = f"""\
{header(Job(name, folder, ""), options, cwd)}

{setup(want)}

restarts=${{SLURM_RESTART_COUNT:-0}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$((20000 + SLURM_JOB_ID % 10000))
echo "job $SLURM_JOB_ID, start $restarts: $SLURM_NNODES node(s) $SLURM_JOB_NODELIST, rendezvous at $address:$port"

# TERM is scancel's, or Slurm requeues the job itself: then this script does not. USR1 is for the processes.
ended=
trap 'ended=yes' TERM
trap : USR1

# USR1 is ignored until the agent listens; its ranks save, and it ends with status {REQUEUE_STATUS}.
{_words(srun)} bash -c 'trap "" USR1; exec -- "$@"' _ \\
  {f" {chr(92)}{chr(10)}  ".join(launch)} &
task=$!
while kill -0 "$task" 2>/dev/null; do wait "$task"; done
wait "$task"
status=$?

if [ "$status" -eq {REQUEUE_STATUS} ] && [ -z "$ended" ]; then
  if [ "$restarts" -lt {want.max_requeues} ]; then
    echo "saved; requeued ($((restarts + 1)) of at most {want.max_requeues})"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
  else
    echo "saved, but requeued {want.max_requeues} times already: submit again to resume" >&2
  fi
fi
exit "$status"
"""
    return Job(name, folder, text)


def array_job(
    name: str, folder: Path, verbs: list[list[str]], want: Resources, *, python: str, cwd: Path, launched: bool
) -> Job:
    """An array of one-node jobs, one per verb; `launched` runs each under torchrun, a process per GPU."""
    program = f"{_words([want.python or python])} -m rerankvpr"
    if launched:
        program += f" launch --nproc-per-node {want.processes_per_node} --"
    options = [f"array=0-{len(verbs) - 1}"] if len(verbs) > 1 else []
    options += ["nodes=1", "ntasks-per-node=1", *resource_options(want), "requeue"]
    srun = _words(["srun", *core_flags(want), *container_flags(want)])
    lines = [f"{srun} {program} {_words(verb)}" for verb in verbs]
    work = lines[0]
    if len(verbs) > 1:
        cases = "\n".join(f"  {i}) {line} ;;" for i, line in enumerate(lines))
        work = f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac'
    job = Job(name, folder, "", is_array=len(verbs) > 1)
    text = f"""\
{header(job, options, cwd)}

{setup(want)}

{work}
"""
    return Job(name, folder, text, is_array=len(verbs) > 1)


def header(job: Job, options: list[str], cwd: Path) -> str:
    """The first lines of a script: what sbatch reads. Raises ValueError for an option that sbatch would misread."""
    named = [
        ("the job's name", f"job-name={job.name}"),
        ("the output folder", f"output={job.log}"),
        ("submit", "open-mode=append"),
        ("the working folder", f"chdir={cwd}"),
        *(("submit", option) for option in options),
    ]
    lines = [_directive(option, where) for where, option in named]
    return "\n".join(["#!/bin/bash", *lines])


def _directive(option: str, where: str) -> str:
    """The `#SBATCH` line of one option, NAME or NAME=VALUE.

    sbatch splits these lines at spaces and reads quotes, backslashes and `#`, and the shell ends its comments at a
    newline: a value with one of these could become another option, or a command. Spaces and `#` are quoted; ValueError
    names all else.
    """
    name, equals, value = option.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"{where}: {option!r} is no option of sbatch; expected NAME or NAME=VALUE, such as exclusive")
    unsafe = next((c for c in value if c in "\"'\\`" or not (c.isprintable() or _is_byte(c))), None)
    if unsafe:
        raise ValueError(
            f"{where}: {value!r} holds {unsafe!r}, which a batch script cannot; use no quotes, backslashes or control "
            "characters there"
        )
    plain = re.fullmatch(r"[\w./:%@,+=~*&|()\[\]-]*", value, re.ASCII)
    return f"#SBATCH --{name}{equals}{value}" if plain else f'#SBATCH --{name}="{value}"'


def _words(words: list[str]) -> str:
    """Words as a shell reads them back, each one word. Raises ValueError for one that no command line can hold."""
    for word in words:
        if not all(c != "\0" and (not 0xD800 <= ord(c) <= 0xDFFF or _is_byte(c)) for c in word):
            raise ValueError(f"submit: {word!r} holds a character that no command line can")
    return shlex.join(words)


def _is_byte(c: str) -> bool:
    """Whether a character stands for a byte of a file name that is no UTF-8."""
    return 0xDC80 <= ord(c) <= 0xDCFF


def setup(want: Resources) -> str:
    """Lines before the work."""
    # Since 22.05 srun does not take --cpus-per-task from its job, and gives each task one core.
    cores = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
    return "\n".join(["set -u", cores, *want.setup])


def resource_options(want: Resources) -> list[str]:
    """sbatch's options for what a stage asks for, without their dashes."""
    options = [f"gpus-per-node={want.gpus_per_node}"] if want.gpus_per_node else []
    options += [f"cpus-per-task={want.cpus_per_task}"] if want.cpus_per_task else []
    for flag in ("mem", "time", "partition", "account", "qos", "constraint"):
        if value := getattr(want, flag):
            options.append(f"{flag}={value}")
    return [*options, *want.sbatch]


def core_flags(want: Resources) -> list[str]:
    """srun's flags for the cores of its one task per node: all that the job has there, bound to none of them."""
    asked = [f"--cpus-per-task={want.cpus_per_task}"] if want.cpus_per_task else []
    return [*asked, "--cpu-bind=none"]


def container_flags(want: Resources) -> list[str]:
    """srun's flags for an image."""
    named = {"container-image": want.container_image, "container-mounts": want.container_mounts}
    return [f"--{flag}={value}" for flag, value in named.items() if value]
