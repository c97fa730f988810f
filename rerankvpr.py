"""The `rerankvpr` command: makes sure that our packages are ours, then hands over to `launch`."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Messages without links, and no statistics of use sent to the libraries' makers; variables that are set win.
LIBRARIES = {
    "PYDANTIC_ERRORS_INCLUDE_URL": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
PACKAGES = ("configs", "data_pipeline", "model", "memory", "trainer", "eval", "launch")


def check_packages() -> None:
    """Exits with one line if a package of another project stands in front of one of ours (ROS ships a `launch`)."""
    home = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        found = next((Path(place).resolve() for place in places if place), None)
        if found is None or home not in found.parents:
            sys.exit(
                f"rerankvpr: package {name!r} should come from {home / name}, but Python finds {found}; take that "
                "folder off PYTHONPATH or install rerankvpr in an environment of its own"
            )


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
    prepare_streams()
    check_packages()
    prepare_libraries()
    argv = prepare_arguments()

    def run() -> int:
        from launch.cli import main as run_verb

        return run_verb(argv)

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
    sys.exit(status)


def _has_lost_its_reader(descriptor: int) -> bool:
    """Whether a descriptor is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    main()
