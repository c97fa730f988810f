"""`python -m tests.as_nobody VERB ...`: a command as an ordinary user, who may read all and owns nothing; for root."""

from __future__ import annotations

import ctypes
import os
import struct

NOBODY = 65534
PR_SET_KEEPCAPS = 8  # of Linux's sys/prctl.h
CAP_DAC_READ_SEARCH = 2  # of Linux's linux/capability.h, as the next: Python may be installed in root's home
CAPABILITY_VERSION_3 = 0x20080522


def become_nobody() -> None:
    """Gives up root's rights but the one to read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    kept = 1 << CAP_DAC_READ_SEARCH  # effective and permitted, none inheritable
    if libc.capset(struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    become_nobody()
    from rerankvpr import main

    main()
