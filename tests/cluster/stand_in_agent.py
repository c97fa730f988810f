#!/usr/bin/env python3
"""Stands in for the python that a job script starts: notes its starts and signals, and ends with 75 when told to stop.

It shows what SLURM and the script do, at no cost; test_slurm.py shows the same with trainings.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

OUT, NODE = Path(os.environ["OUT"]), os.environ["SLURMD_NODENAME"]


def note(name: str, text: str) -> None:
    """Appends a line to a file of OUT."""
    with (OUT / name).open("a") as file:
        file.write(f"{text}\n")


def stop(number: int, _frame: FrameType | None) -> None:
    """Notes a signal and ends."""
    note("signals", f"{signal.Signals(number).name} {NODE}")
    sys.exit(75)


def main() -> None:
    """Runs until OUT has a file `finish`."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
    note("starts", f"{NODE} {' '.join(sys.argv[1:])}")
    note("cores", f"{NODE} {len(os.sched_getaffinity(0))}")
    while not (OUT / "finish").exists():
        time.sleep(0.1)


if __name__ == "__main__":
    main()
