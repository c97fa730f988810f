"""Load of the machine, by MLflow's own collectors and under its names."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


class SystemMetrics(threading.Thread):
    """Gives `log` the CPU, memory, disk, network and GPU use of this machine every `every_s` seconds, as `system/...`.

    Units are in the names: percentage, megabytes (10^6 bytes), watts. Network counts from the start. A sample that
    fails is the last one and told to `say`.
    """

    def __init__(self, log: Callable[[dict[str, float]], None], every_s: float, say: Callable[[str], None]) -> None:
        super().__init__(name="system metrics", daemon=True)
        self._log, self._every_s, self._say = log, every_s, say
        self._ended = threading.Event()

    def run(self) -> None:
        """Samples until `stop`."""
        try:
            self._sample()
        except Exception as error:  # noqa: BLE001 - a driver may raise anything, and no training should end of it
            self._say(f"no more system metrics: {error}")

    def _sample(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no driver, no GPU
            monitors.append(GPUMonitor())
        monitors[0].collect_metrics()  # the CPU's use is counted from one call to the next
        monitors[0].clear_metrics()
        while not self._ended.wait(self._every_s):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            self._log(values)

    def stop(self) -> None:
        """Takes no further sample."""
        self._ended.set()
