"""RerankVPR for use from Python, and the `rerankvpr` command.

    import rerankvpr

    m = rerankvpr.load("runs/demo")
    descriptors = m.describe(["a.jpg", "b.jpg"])

Importing this module imports nothing else of the project, and no torch; `load` and `Index` do.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import importlib.util
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from eval.describer import Describer, LocalImage, Match
    from eval.index.index import Index
    from eval.index.location import Location
    from trainer.published import PublishedNetwork

# Messages without links, and no statistics of use sent to the libraries' makers; variables that are set win.
LIBRARIES = {
    "PYDANTIC_ERRORS_INCLUDE_URL": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
PACKAGES = ("configs", "data_pipeline", "model", "memory", "trainer", "eval", "launch")

__all__ = ["Describer", "Index", "LocalImage", "Location", "Match", "PublishedNetwork", "load"]
_HOMES = {
    "Describer": "eval.describer",
    "Index": "eval.index.index",
    "Location": "eval.index.location",
    "LocalImage": "eval.describer",
    "Match": "eval.describer",
    "PublishedNetwork": "trainer.published",
}


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    plugins: Sequence[str] = (),
    **settings: Any,
) -> Describer:
    """A network for use, with the rule by which its training resized images.

    `source` is the output folder of a run (its best checkpoint, else its newest), a checkpoint, a file that `rerankvpr
    export` wrote, a backbone's weights (`.pth`, `.safetensors`), a model in MLflow (`models:/NAME/VERSION`), or the
    name of a backbone whose weights are published, such as `vitb14`, which is downloaded once. `device` is the current
    GPU where torch has one, else the CPU. `plugins` are files or modules to run, for a network that needs them: those
    that the source records are not run by themselves. `settings` replace keys of the recipe's `eval` section:
    `image_size=322, resize="aspect", rerank={"saliency_thresh": 0.3}`. Raises ValueError or OSError, with what would be
    right.
    """
    check_imports()
    prepare_libraries()
    from trainer.pretrained import load as load_any

    return load_any(Path(source) if not isinstance(source, str) else source, device=device, plugins=plugins, **settings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_imports()
    prepare_libraries()
    return getattr(importlib.import_module(_HOMES[name]), name)


def check_imports() -> None:
    """Raises ImportError if a package of another project stands in front of one of ours."""
    if foreign := foreign_package():
        raise ImportError(foreign)


def check_packages() -> None:
    """Exits with one line if a package of another project stands in front of one of ours (ROS ships a `launch`)."""
    if foreign := foreign_package():
        sys.exit(f"rerankvpr: {foreign}")


def foreign_package() -> str:
    """Which package of another project stands in front of one of ours, in a line; empty if none does."""
    home = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        found = next((Path(place).resolve() for place in places if place), None)
        if found is None or home not in found.parents:
            return (
                f"package {name!r} should come from {home / name}, but Python finds {found}; take that folder off "
                "PYTHONPATH or install rerankvpr in an environment of its own"
            )
    return ""


def prepare_streams() -> None:
    """Makes stdout and stderr take any text, and be there: an ASCII terminal or a closed one must end nothing.

    What an encoding lacks is written as an escape. A stream that is closed becomes /dev/null, or the next file that is
    opened would get its number, and our output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prepare_libraries() -> None:
    """Sets `LIBRARIES` for this process and those that it starts; call it before they are imported."""
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)


def prepare_arguments() -> list[str]:
    """This program's arguments; what of them is secret is neither in `ps` nor in anything that is printed."""
    from configs.secrets import clean_streams, hide_arguments

    clean_streams()
    return hide_arguments()


def main() -> None:
    """Entry point of the console script."""
    atexit.register(_ignore_signals)  # the first to be registered is the last to be called
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a verb has its own, Ctrl-C ends without a traceback
    prepare_streams()
    check_packages()
    prepare_libraries()
    argv = prepare_arguments()

    def run() -> int:
        from launch.cli import main as run_verb

        return run_verb(argv, ends=True)

    end_with(run)


def end_with(run: Callable[[], int]) -> NoReturn:
    """Ends the process with the status that `run` returns, and with one line if stdout does not take its output."""
    status: int | str | None
    try:
        try:
            status = run()
        except SystemExit as stop:  # flags that are wrong, help
            status = stop.code
        sys.stdout.flush()
    except OSError as error:
        status = 2
        if isinstance(error, BrokenPipeError) and _has_lost_its_reader(1):
            status = 0  # the reader has seen enough, as `head` has
        elif error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO):
            print(f"rerankvpr: stdout: {error.strerror}; not all of the output is there", file=sys.stderr)
        else:
            print(f"rerankvpr: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _keep_status(status)
    sys.exit(status)


def _keep_status(status: int | str | None) -> None:
    """Lets a signal that comes while libraries end, when all is done, end the process at once with the same status."""
    number = status if isinstance(status, int) else int(status is not None)
    if threading.current_thread() is threading.main_thread():
        for asked in (signal.SIGTERM, signal.SIGINT):
            signal.signal(asked, lambda *_: os._exit(number))


def _ignore_signals() -> None:
    """For the very end, when Python no longer runs handlers and C++ takes its time."""
    if threading.current_thread() is threading.main_thread():
        for asked in (signal.SIGTERM, signal.SIGINT):
            signal.signal(asked, signal.SIG_IGN)


def _has_lost_its_reader(descriptor: int) -> bool:
    """Whether a descriptor is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    main()
