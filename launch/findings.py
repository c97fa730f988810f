"""What a group's machines said of themselves, and what it means for a training: findings with their remedies."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

CLOCK_S = 1.0
FREE_GB = 10.0
LATENCY_MS = 20.0
BANDWIDTH_MB_S = 50.0


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
    gpu: str = ""
    gpu_free_gb: float = 0.0
    gpu_total_gb: float = 0.0
    gpu_errors: int = 0


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


def judge(facts: list[Facts], network: Network) -> list[Finding]:
    """What the facts of all ranks mean, each fault with its remedy; a pure function."""
    world = len(facts)
    nodes = {one.node: one for one in facts}
    found = [_judge_versions(facts)]
    found += _judge_folders(facts)
    offset = max(network.clock_offsets_s, key=abs)
    late = facts[network.clock_offsets_s.index(offset)]
    found.append(
        Finding("ok", f"clocks agree to {abs(offset):.3f} s")
        if abs(offset) < CLOCK_S
        else Finding(
            "warning",
            f"the clock of {late.host} (rank {late.rank}) is {offset:+.1f} s off rank 0's",
            "start chrony or ntpd there: times in logs and MLflow do not line up",
        )
    )
    interfaces = {f"{one.host}: {one.interface}" for one in nodes.values()}
    found.append(Finding("ok", f"{world} rank(s) on {len(nodes)} node(s); {', '.join(sorted(interfaces))}"))
    if world > 1:
        slow = network.latency_ms > LATENCY_MS or network.bandwidth_mb_s < BANDWIDTH_MB_S
        found.append(
            Finding(
                "warning" if slow else "ok",
                f"all-reduce: {network.latency_ms:.2f} ms for one number, {network.bandwidth_mb_s:,.0f} MB/s a rank",
                "a slow interface? name the fast one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" if slow else "",
            )
        )
    return found + _judge_gpus(facts)


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


def _judge_gpus(facts: list[Facts]) -> list[Finding]:
    with_gpu = [one for one in facts if one.gpu]
    found = []
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
    if len({one.gpu for one in facts}) > 1:
        kinds = ", ".join(sorted({one.gpu or "none" for one in facts}))
        found.append(
            Finding("warning", f"GPUs differ: {kinds}", "the slowest sets the pace; --constraint picks one kind")
        )
    if with_gpu and not found:
        found.append(Finding("ok", f"{len(with_gpu)} x {facts[0].gpu}, memory free, no errors"))
    return found


def complain(checked: Checked, *, aloud: bool) -> None:
    """Prints warnings if `aloud`, and raises ValueError with what would stop a training, remedies included."""
    for finding in checked.findings:
        if aloud and finding.level == "warning":
            print(f"doctor: {finding.what}; {finding.remedy}", file=sys.stderr, flush=True)
    if checked.errors:
        raise ValueError("\n".join(f"doctor: {one.what}; {one.remedy}" for one in checked.errors))
