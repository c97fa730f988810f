"""`python -m tests.as_nobody VERB ...`: a command as an ordinary user, who owns nothing; to be started by root."""

from __future__ import annotations

import os

NOBODY = 65534

if __name__ == "__main__":
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    from rerankvpr import main

    main()
