"""What a plan of memory consists of: parts, the moments of a training that they are held in, and the greatest sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

HEAP = 32 << 20  # bytes of the largest tensor that glibc takes from its heap (DEFAULT_MMAP_THRESHOLD_MAX)
# What torch's allocator takes of a GPU for a byte that is asked for: an estimate. A training of ViT-B/14 on an H100
# took 1.09, of tensors that the plan put 4 % too high (benchmarks/results/gpu.txt).
FRAGMENTED = 1.05

# Backward has three moments: "backward", its begin, when all activations are there and no gradient yet; "bucket", when
# a first full bucket of gradients is sent while it runs; "reduce", its end, when no activations are left.
Phase = Literal[
    "always",
    "compose",
    "build",
    "augment",
    "forward",
    "loss",
    "backward",
    "bucket",
    "reduce",
    "update",
    "save",
    "evaluate",
]


@dataclass(frozen=True)
class Part:
    """Bytes that one part takes on the device and on the host, and when."""

    name: str
    device: float
    host: float = 0.0
    phases: tuple[Phase, ...] = ("always",)
    tensor: float = math.inf  # bytes of its largest tensor

    def in_heap(self, largest: int) -> bool:
        """Whether glibc takes it from its heap on a CPU, where it stays resident after it has been freed.

        `largest` is the number of bytes up to which it does.
        """
        return self.tensor <= largest and not {"always", "save"} & set(self.phases)


@dataclass(frozen=True)
class MemoryPlan:
    """A rank's memory: parts, and the greatest sums of those that are held together, in bytes."""

    parts: tuple[Part, ...]
    on_cpu: bool  # ranks on a CPU have one memory, which the host's part is in
    heap: int = HEAP  # bytes of the largest tensor that is in glibc's heap

    @property
    def phases(self) -> dict[Phase, tuple[float, float]]:
        """Bytes on device and host in each phase of a training.

        On a CPU small tensors come from glibc's heap, which keeps what it has held at most, and large ones go back to
        the system as soon as they are freed. On a GPU the gaps between tensors of torch's allocator are added.
        """
        names: set[Phase] = {phase for part in self.parts for phase in part.phases} - {"always"}
        held = {name: [part for part in self.parts if {name, "always"} & set(part.phases)] for name in names}
        if self.on_cpu:
            heap = max(
                sum(part.device + part.host for part in parts if part.in_heap(self.heap)) for parts in held.values()
            )
            held = {name: [part for part in parts if not part.in_heap(self.heap)] for name, parts in held.items()}
        else:
            heap = 0.0
        gaps = 1.0 if self.on_cpu else FRAGMENTED
        return {
            name: (heap + gaps * sum(part.device for part in parts), sum(part.host for part in parts))
            for name, parts in held.items()
        }

    @property
    def device_peak(self) -> float:
        """Most bytes on the device; on a CPU, of the process."""
        return max(device + (host if self.on_cpu else 0) for device, host in self.phases.values())

    @property
    def host_peak(self) -> float:
        """Most bytes of host memory beside the process's own; 0 on a CPU, where `device_peak` has them."""
        return 0.0 if self.on_cpu else max(host for _, host in self.phases.values())
