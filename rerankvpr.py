"""The `rerankvpr` command: makes sure that our packages are ours, then hands over to `launch`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

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


def main() -> None:
    """Entry point of the console script."""
    check_packages()
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    from launch.cli import main as run

    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


if __name__ == "__main__":
    main()
