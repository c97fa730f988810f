"""Warm starts: a fork server imports what ranks need once per node; each rank, first or restarted, is a fork of it.

The server is `multiprocessing`'s, which `torch.distributed.elastic` starts ranks from by start_method="forkserver".
This module adds what a training asks of it:

- It runs no thread of Python and never starts CUDA, so that forking it is safe; where an import breaks this rule, ranks
  import everything themselves and rank 0 of the node says why.
- Signals wait in it, also those that a scheduler sends to the whole process group, so that the server outlives the
  polite end of its ranks. A rank takes signals as any process does.
- Nobody is left behind. The kernel kills the server when the agent that started it ends, however it ends, and a rank
  when the server ends. A rank's parent is the server, not the agent: PR_SET_PDEATHSIG in a rank tells of the server's
  end, and the chain from agent to server to rank tells of the agent's.
- A rank has the state of a process started by itself: random generators, signals, standard streams, name in `ps`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

from configs.secrets import has_secret, hidden, without_secrets
from data_pipeline.shared_locks import why_no_locks
from trainer.lifeline import end_with

ORDER = "RERANKVPR_FORK_SERVER"  # of an agent to its server: "<agent's pid> <module>,<module>..."
SERVER_MODULE = "launch.fork_server_main"
GPUS = ("nvidia[0-9]*", "dxg", "kfd")  # in /dev: NVIDIA's, those of a Windows host, AMD's
HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_NAME = 15  # of Linux's sys/prctl.h
CUDA_ERROR_NOT_INITIALIZED = 3  # of cuda.h


@dataclass(frozen=True)
class Server:
    """What a fork knows of the server that it comes from."""

    pid: int
    seconds: float  # that the imports took
    unsafe: str  # why forks of it must not be ranks; empty if they may


served_by: Server | None = None  # set in the server, and so in its forks


def unavailable() -> str:
    """Why this machine has no warm starts; empty if it has."""
    if sys.platform != "linux":
        return "warm starts need Linux"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "Python has no fork server here"
    return why_no_locks()


def gpu_in_dev() -> bool:
    """Whether this machine shows a GPU: what can be known without importing torch."""
    return any(any(Path("/dev").glob(pattern)) for pattern in GPUS)


def start(modules: Sequence[str]) -> None:
    """Starts this process's fork server and returns at once; the server imports `modules` meanwhile.

    An entry `module:function` is a module with a function that imports more; it is called without arguments.
    Call it from the main thread, which has to live as long as the server. A server that has died is started again, the
    same way, by the next start of ranks.
    """
    os.environ[ORDER] = f"{os.getpid()} {','.join(modules)}"
    multiprocessing.set_forkserver_preload([SERVER_MODULE])
    with signals_held():  # inherited by the server and by multiprocessing's resource tracker
        forkserver.ensure_running()


def become_server(modules: Sequence[str], agent: int) -> None:
    """Turns this process into the warm fork server of `agent`: called once, before it forks anything."""
    global served_by
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    end_with(agent)
    show_as(["rerankvpr:fork-server", f"of:{agent}"])
    began = time.monotonic()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch asks NVML for GPUs, which leaves CUDA alone
    if not gpu_in_dev():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nobody has to ask
    unsafe = _import_all(modules) or _unsafe_to_fork()
    served_by = Server(os.getpid(), time.monotonic() - began, unsafe)


def run_rank(program: str, *argv: str) -> None:
    """What a forked rank runs: `python -m PROGRAM ARGV`. Ends by SystemExit with its status."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    shown = [without_secrets(word, is_address=has_secret(word)) for word in argv]  # `ps` is for all to see
    become_rank([f"rerankvpr:rank-{rank}-of-{world}", *shown])
    sys.argv = [program, *argv]
    if served_by is None or served_by.unsafe:
        why = served_by.unsafe if served_by else f"the fork server could not import {program}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"rerankvpr: ranks of this node start cold: {why}", file=sys.stderr, flush=True)
        sys.exit(_in_a_new_process(["-m", program, *hidden(argv)]))
    as_a_program(lambda: runpy.run_module(program, run_name="__main__", alter_sys=True))


def become_rank(name: Sequence[str]) -> None:
    """Gives this fork the state of a process started by itself, with `name` as its command line in `ps`."""
    end_with(served_by.pid if served_by else os.getppid())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    show_as(name)
    for stream in ("stdout", "stderr"):
        _unbuffer(stream)
    for module in ("numpy", "torch"):
        if module in sys.modules:
            _RESEED[module]()
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # a temporary folder of the server's is not a rank's to remove


def as_a_program(main: Callable[[], object]) -> None:
    """Calls `main` and ends as Python ends a program: with its status, or a traceback on stderr and status 1.

    multiprocessing ends a fork by os._exit; what `main` left to be done at the end, as temporary folders do, is done.
    """
    try:
        main()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - what Python itself does with it
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
    sys.exit(0)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Inside, `HELD` signals wait; processes started inside begin with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def show_as(words: Sequence[str]) -> None:
    """Makes `words` the command line that `ps` and `top` show, as far as the old one's memory has room for them."""
    text = b"\0".join(os.fsencode(word) for word in words)
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49 of proc(5)
    if 0 < begin < end:
        ctypes.memmove(begin, text[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)
    _libc().prctl(PR_SET_NAME, ctypes.c_char_p(os.fsencode(words[0])[:15]), 0, 0, 0)


def _import_all(modules: Sequence[str]) -> str:
    """Imports what can be imported; why nothing may be forked, if an import raises something else than ImportError."""
    for entry in modules:
        module, _, function = entry.partition(":")
        try:
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
        except ImportError:  # the ranks' own error will say more
            continue
        except Exception as error:  # noqa: BLE001 - a rank that imports it says what is wrong
            return f"importing {entry} raised {type(error).__name__}: {error}"
    return ""


def _unsafe_to_fork() -> str:
    """Why a fork of this process could not be a rank; empty if it can."""
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"an import started threads ({names})"
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # not loaded
        return ""
    if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != CUDA_ERROR_NOT_INITIALIZED:
        return "an import started CUDA, which a forked process cannot use"
    return ""


def _in_a_new_process(arguments: Sequence[str]) -> int:
    """Runs Python anew for this rank, passes signals on, and returns the status; dies of the signal that it died of."""
    child = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        preexec_fn=partial(end_with, os.getpid()),
    )
    for number in HELD:
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    status = child.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _unbuffer(name: str) -> None:
    """As torchrun starts Python, by `-u`: what a rank prints is seen when it prints it."""
    stream = getattr(sys, name)
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        raw = open(stream.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115 - for the life of the process
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True))


def _reseed_numpy() -> None:
    import numpy as np

    np.random.seed()


def _reseed_torch() -> None:
    import torch

    if torch.initial_seed() != DEFAULT_SEED:  # an import has drawn one, which each process would draw for itself
        torch.seed()


DEFAULT_SEED = 67280421310721  # of c10/core/GeneratorImpl.h
_RESEED: dict[str, Callable[[], None]] = {"numpy": _reseed_numpy, "torch": _reseed_torch}  # Python reseeds its own


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
