"""What a group's machines said of themselves, and what it means for a training: findings with their remedies."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from configs.node import MORE_DECODING
from launch.facts import Facts

CLOCK_S = 1.0
FREE_GB = 10.0
LATENCY_MS = 20.0
BANDWIDTH_MB_S = 50.0
CORES_A_RANK = 2  # fewer than these, where the host has more, starve a rank's decoder
SHM_GB = 0.5  # Docker's default is 64 MB, of which NCCL uses up to 10 for each pair of GPUs
MEMLOCK_GB = 1.0


@dataclass(frozen=True)
class Network:
    """Clocks and an all-reduce over all ranks."""

    clock_offsets_s: list[float]  # of each rank against rank 0
    latency_ms: float  # of an all-reduce of one number
    bandwidth_mb_s: float  # that each rank sends in a ring all-reduce, 2 (W - 1) / W bytes a byte, in MB (2^20)


@dataclass(frozen=True)
class Finding:
    """One check: how it went, what was found, what to do."""

    level: Literal["ok", "warning", "error"]
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Checked:
    """All findings, on every rank."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """What would stop or spoil a training."""
        return [finding for finding in self.findings if finding.level == "error"]


def judge_facts(facts: list[Facts]) -> list[Finding]:
    """What the machines themselves say; with an error here a network test may hang, so it comes before that.

    A pure function; each fault comes with its remedy.
    """
    nodes = {one.node: one for one in facts}
    interfaces = {f"{one.host}: {one.interface}" for one in nodes.values()}
    found = [_judge_versions(facts), *_judge_folders(facts)]
    found.append(Finding("ok", f"{len(facts)} rank(s) on {len(nodes)} node(s); {', '.join(sorted(interfaces))}"))
    return [*found, *_judge_cores(facts), *_judge_feeding(facts), *_judge_gpus(facts), *_judge_limits(facts)]


def judge_network(facts: list[Facts], network: Network) -> list[Finding]:
    """What clocks and an all-reduce of all ranks say; a pure function."""
    offset = max(network.clock_offsets_s, key=abs)
    late = facts[network.clock_offsets_s.index(offset)]
    found = [
        Finding("ok", f"clocks agree to {abs(offset):.3f} s")
        if abs(offset) < CLOCK_S
        else Finding(
            "warning",
            f"the clock of {late.host} (rank {late.rank}) is {offset:+.1f} s off rank 0's",
            "start chrony or ntpd there: times in logs and MLflow do not line up",
        )
    ]
    if len(facts) > 1:
        slow = network.latency_ms > LATENCY_MS or network.bandwidth_mb_s < BANDWIDTH_MB_S
        found.append(
            Finding(
                "warning" if slow else "ok",
                f"all-reduce: {network.latency_ms:.2f} ms for one number, {network.bandwidth_mb_s:,.0f} MB/s a rank",
                "a slow interface? name the fast one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" if slow else "",
            )
        )
    return found


def _judge_versions(facts: list[Facts]) -> Finding:
    first = facts[0]
    for one in facts:
        for name in {*first.versions, *one.versions}:
            here, there = first.versions.get(name, "none"), one.versions.get(name, "none")
            if here != there:
                return Finding(
                    "error",
                    f"{name} is {there} on {one.host} (rank {one.rank}) and {here} on {first.host} (rank 0)",
                    "use one environment on all nodes: a shared folder, or one container image",
                )
    shown = ", ".join(f"{name} {first.versions[name]}" for name in ("python", "torch") if name in first.versions)
    return Finding("ok", f"versions agree: {shown}, sources {first.versions.get('rerankvpr', '')}")


def _judge_folders(facts: list[Facts]) -> list[Finding]:
    found = []
    for one in facts:
        for folder in one.not_seen:
            found.append(
                Finding(
                    "error",
                    f"{one.host} (rank {one.rank}) does not see rank 0's {folder}",
                    "put it on a file system that all nodes mount, or mount it there as well",
                )
            )
    lowest: dict[str, Facts] = {}
    for one in facts:
        for folder, free in one.free_gb.items():
            if folder not in lowest or free < lowest[folder].free_gb[folder]:
                lowest[folder] = one
    for folder, one in lowest.items():
        free = one.free_gb[folder]
        if free < FREE_GB:
            found.append(
                Finding("warning", f"{folder} has {free:.1f} GB free on {one.host}", "free space, or choose another")
            )
        else:
            found.append(Finding("ok", f"{folder}: {free:,.0f} GB free or more, seen by all"))
    return [one for one in found if one.level != "ok" or not _named(found, one.what.split(":")[0])]


def _named(found: list[Finding], folder: str) -> bool:
    return any(one.level == "error" and one.what.endswith(f" {folder}") for one in found)


def _judge_cores(facts: list[Facts]) -> list[Finding]:
    """One finding for each node: the cores that its ranks may use, which decode the images."""
    found = []
    for node in sorted({one.node for one in facts}):
        ranks = [one for one in facts if one.node == node]
        cores = sorted({core for one in ranks for core in one.cores})
        host, of = ranks[0].host, ranks[0].cores_of_host
        each = "; ".join(f"rank {one.rank}: {_spans(one.cores)}" for one in ranks)
        what = f"{host}: {len(ranks)} rank(s) use {len(cores)} of {of} cores ({each})"
        if cores and len(cores) < CORES_A_RANK * len(ranks) and len(cores) < of:
            remedy = "ask SLURM for more (--cpus-per-task) and bind no task (srun --cpu-bind=none), or look at taskset"
            found.append(Finding("warning", what, remedy))
        elif cores:
            found.append(Finding("ok", what))
    return found


def _judge_feeding(facts: list[Facts]) -> list[Finding]:
    """One finding for each node that is to take images at a known rate: whether its cores decode as many."""
    found = []
    for node in sorted({one.node for one in facts}):
        ranks = [one for one in facts if one.node == node and one.images_per_s]
        if not ranks:
            continue
        cores, demand = len({core for one in ranks for core in one.cores}), sum(one.images_per_s for one in ranks)
        each = sum(one.core_images_per_s for one in ranks) / len(ranks)
        gb_s = demand * ranks[0].image_bytes / 1e9
        what = (
            f"{ranks[0].host}: {len(ranks)} rank(s) at {ranks[0].images_per_s:,.0f} images/s each need "
            f"{demand / each:.0f} cores that decode {each:,.0f} images/s each, and {gb_s:.2f} GB/s; it has {cores}"
        )
        found.append(Finding("warning", what, MORE_DECODING) if cores * each < demand else Finding("ok", what))
    return found


def _spans(cores: list[int]) -> str:
    """Numbers as spans: 0-3,8."""
    spans: list[list[int]] = []
    for core in sorted(cores):
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in spans)


def _judge_gpus(facts: list[Facts]) -> list[Finding]:
    with_gpu = [one for one in facts if one.gpu]
    found = []
    for one in facts:
        if one.no_gpu_because:
            found.append(Finding("error", f"rank {one.rank} on {one.host}: {one.no_gpu_because}", one.no_gpu_remedy))
        elif with_gpu and not one.gpu:
            what = f"rank {one.rank} on {one.host} has no GPU, and rank {with_gpu[0].rank} on {with_gpu[0].host} has"
            found.append(Finding("error", what, "ask for the same number of GPUs on all nodes: one for each rank"))
    for one in with_gpu:
        if one.gpu_errors:
            found.append(
                Finding(
                    "error",
                    f"rank {one.rank} on {one.host}: {one.gpu_errors} uncorrected memory errors of its {one.gpu}",
                    "leave the node out (sbatch --exclude) and tell its administrators",
                )
            )
        if one.gpu_free_gb < 0.9 * one.gpu_total_gb:
            found.append(
                Finding(
                    "warning",
                    f"rank {one.rank} on {one.host}: {one.gpu_free_gb:.1f} of {one.gpu_total_gb:.1f} GB free",
                    "another process holds the rest: nvidia-smi shows which",
                )
            )
        if one.gpu_note:
            what = f"rank {one.rank} on {one.host}: {one.gpu_note}"
            found.append(Finding("warning", what, "look at that GPU: nvidia-smi -q, dmesg"))
    shared = Counter((one.node, one.gpu_uuid) for one in with_gpu if one.gpu_uuid)
    for (node, uuid), ranks in shared.items():
        if ranks > 1:
            host = next(one.host for one in with_gpu if one.node == node)
            what = f"{ranks} ranks of {host} compute on one GPU, {uuid}"
            found.append(Finding("error", what, "NCCL refuses that; start one process for each GPU"))
    if len({one.gpu for one in with_gpu}) > 1:
        kinds = ", ".join(sorted({one.gpu for one in with_gpu}))
        found.append(
            Finding("warning", f"GPUs differ: {kinds}", "the slowest sets the pace; --constraint picks one kind")
        )
    if with_gpu and not found:
        visible = sorted({f"{one.host}: {one.visible_gpus}" for one in with_gpu if one.visible_gpus})
        shown = f"; CUDA_VISIBLE_DEVICES {', '.join(visible)}" if visible else ""
        found.append(Finding("ok", f"{len(with_gpu)} x {with_gpu[0].gpu}, memory free, no errors{shown}"))
    return found


def _judge_limits(facts: list[Facts]) -> list[Finding]:
    """What NCCL needs of a host beside its GPUs; asked of hosts that have some."""
    found = []
    for one in {one.host: one for one in facts if one.gpu}.values():
        if one.shm_free_gb < SHM_GB:
            found.append(
                Finding(
                    "warning",
                    f"{one.host}: /dev/shm has {one.shm_free_gb:.2f} GB free, which GPUs of one node talk through",
                    "give the container more (docker --shm-size 8g, or --ipc host)",
                )
            )
        if one.infiniband and one.memlock_gb is not None and one.memlock_gb < MEMLOCK_GB:
            found.append(
                Finding(
                    "warning",
                    f"{one.host}: a process may lock {one.memlock_gb:.2f} GB of memory, which InfiniBand needs more of",
                    "ulimit -l unlimited, in SLURM by PropagateResourceLimitsExcept=MEMLOCK and slurmd's own limit",
                )
            )
    return found


def complain(checked: Checked, *, aloud: bool) -> None:
    """Prints warnings if `aloud`, and raises ValueError with what would stop a training, remedies included."""
    for finding in checked.findings:
        if aloud and finding.level == "warning":
            print(f"doctor: {finding.what}; {finding.remedy}", file=sys.stderr, flush=True)
    if checked.errors:
        raise ValueError("\n".join(f"doctor: {one.what}; {one.remedy}" for one in checked.errors))
