"""`torchrun ... -m tests.faulty FAULTS RECIPE ...`: a training in which things go wrong where FAULTS, a JSON, says.

Keys, each with the rank and the step (from 0) at which it happens:
  nan_descriptor   the rank's descriptors are NaN
  nan_gradient     the rank's gradient of one parameter is NaN
  stop             the rank stops itself (SIGSTOP) before its forward pass
  full             the disk of `folder` is filled up; `until`, a later step, makes room again
  memory           the rank may take no more memory than it has, and asks for a gigabyte
These have no step of their own:
  clock            `jumps` are seconds by step (a text), by which the rank's clock is set forward or back
  full_at_the_end  the disk of `folder` is filled up when the rank begins the last evaluation
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

FILLER_BYTES = 1 << 16


def inject(faults: dict[str, dict[str, Any]], rank: int) -> None:
    """Wraps the training's own methods; nothing in the product knows of it."""
    from trainer.step import TrainingStep
    from trainer.validation import Validation

    encode, step, backward = TrainingStep._encode, TrainingStep.__call__, TrainingStep._backward
    evaluate_trained = Validation.evaluate_trained

    def here(name: str, training: TrainingStep) -> bool:
        fault = faults.get(name)
        return fault is not None and fault["rank"] == rank and fault["step"] == training.state.progress.step

    def faulty_encode(self: TrainingStep, images: Any) -> Any:
        descriptors = encode(self, images)
        return descriptors * float("nan") if here("nan_descriptor", self) else descriptors

    def faulty_backward(self: TrainingStep, out: Any, cache: Any) -> Any:
        if not here("nan_gradient", self):
            return backward(self, out, cache)
        parameter = next(p for p in self.state.model.parameters() if p.requires_grad)
        handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return backward(self, out, cache)
        finally:
            handle.remove()

    def faulty_step(self: TrainingStep, *args: Any) -> Any:
        if here("stop", self):
            os.kill(os.getpid(), signal.SIGSTOP)
        if here("memory", self):
            _limit_memory()
            bytearray(1 << 30)
        clock = faults.get("clock")
        if clock and clock["rank"] == rank:
            _set_clock(clock["jumps"].get(str(self.state.progress.step), 0))
        full = faults.get("full")
        if full and full["rank"] == rank:
            filler = Path(full["folder"]) / "filler"
            if self.state.progress.step == full["until"]:
                filler.unlink(missing_ok=True)
            elif self.state.progress.step == full["step"]:
                _fill(filler)
        return step(self, *args)

    def faulty_evaluate_trained(self: Validation, pictures: Path) -> Any:
        full = faults.get("full_at_the_end")
        if full and full["rank"] == rank:
            _fill(Path(full["folder"]) / "filler")
        return evaluate_trained(self, pictures)

    TrainingStep._encode, TrainingStep._backward = faulty_encode, faulty_backward  # type: ignore[method-assign]
    TrainingStep.__call__ = faulty_step  # type: ignore[method-assign]
    Validation.evaluate_trained = faulty_evaluate_trained  # type: ignore[method-assign]


def _fill(file: Path) -> None:
    """Writes until the disk takes no more."""
    try:
        with file.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"x" * FILLER_BYTES)
    except OSError:
        return


def _limit_memory() -> None:
    """Lets this process take no more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _set_clock(by_s: float) -> None:
    """Sets this process's clock, as all see it that ask Python for the time."""
    seconds, nanoseconds = time.time, time.time_ns
    time.time, time.time_ns = lambda: seconds() + by_s, lambda: nanoseconds() + int(by_s * 1e9)


if __name__ == "__main__":
    inject(json.loads(sys.argv[1]), int(os.environ["RANK"]))
    from trainer.command import main

    sys.exit(main(sys.argv[2:]))
