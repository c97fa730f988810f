"""`rerankvpr --version`: what a report of a fault should name, without waiting for torch."""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "deepspeed", "faiss-gpu", "faiss-cpu")


def version_lines() -> list[str]:
    """One line each for rerankvpr, Python, the installed packages and the CUDA that torch was built for."""
    lines = [f"rerankvpr {_own_version()}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return [*lines, f"cuda {_cuda()}"]


def _own_version() -> str:
    try:
        return metadata.version("rerankvpr")
    except metadata.PackageNotFoundError:
        return f"not installed, run from {Path(__file__).resolve().parent.parent}"


def _cuda() -> str:
    """The CUDA that the installed torch was built for, as its own `version.py` says."""
    spec = importlib.util.find_spec("torch")  # finds it, does not import it
    if spec is None or spec.origin is None:
        return "unknown, torch is not installed"
    found = re.search(r"^cuda\b.*?= '([^']+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else "none, torch was built for CPUs"
