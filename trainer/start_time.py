"""How long a process takes from its birth to the end of its first step, by part: what a restart costs."""

from __future__ import annotations

import os
import time
from pathlib import Path


class StartTime:
    """Laps from the birth of this process; `part_done` ends one."""

    def __init__(self) -> None:
        """Ends the first part, `import`: from the birth to here."""
        self.parts: dict[str, float] = {}
        alive = seconds_alive()
        self._lap_began = time.monotonic() - alive
        self.part_done("import")

    def part_done(self, name: str) -> None:
        """Everything since the last part belongs to `name`."""
        now = time.monotonic()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._lap_began
        self._lap_began = now

    def metrics(self) -> dict[str, float]:
        """Seconds of each part and of all, as metrics."""
        by_part = {f"train/restart_{name}_s": seconds for name, seconds in self.parts.items()}
        return {"train/restart_s": sum(self.parts.values())} | by_part

    def line(self) -> str:
        """The same for a reader; parts that took no time are left out."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items() if seconds >= 0.05)
        return f"first step done {sum(self.parts.values()):.1f} s after the process began ({parts})"


def seconds_alive() -> float:
    """Seconds since this process was forked, to a hundredth; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        born = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, field 22 of proc(5): ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, AttributeError, ValueError):
        return 0.0
