"""What a fork server imports first, and what makes it warm; imported anywhere else, it does nothing."""

from __future__ import annotations

import gc
import os

from launch import fork_server

_agent, _, _modules = os.environ.get(fork_server.ORDER, "").partition(" ")
if _agent and int(_agent) == os.getppid():
    del os.environ[fork_server.ORDER]
    fork_server.become_server([module for module in _modules.split(",") if module], int(_agent))
    gc.collect()
    gc.freeze()  # a collection in a rank leaves the shared objects, and so the shared pages, alone
