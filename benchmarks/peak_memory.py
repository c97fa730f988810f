"""Memory that a process takes, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


class Peak:
    """The most memory that this process has at once from here on, beyond what it has here; mapped pages count.

    `ru_maxrss` cannot tell: it starts with the peak of the process that this one was forked from.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before_mb = status_mb("VmRSS")

    def mb(self) -> float:
        """MiB."""
        return max(0.0, status_mb("VmHWM") - self.before_mb)


def status_mb(key: str, process: int | str = "self") -> float:
    """A line of /proc/PID/status in MiB, such as VmRSS, VmHWM or RssAnon."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024
