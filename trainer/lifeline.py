"""A rank does not outlive what started it: an agent that is killed leaves no ranks that hold a GPU's memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends, if that is torchrun's; Linux alone.

    The parent is torchrun's agent or a server of its that forks ranks. For the kernel it is the thread that started
    this process, which must live as long as the process is to.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        end_with(os.getppid())


def end_with(parent: int) -> None:
    """Has the kernel kill this process when `parent`, which started it, ends; at once if it has ended. Linux alone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
