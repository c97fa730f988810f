"""The wheels that a machine with PyTorch and no network lacks for `make gpu`, in a folder to copy there.

`python -m benchmarks.wheelhouse --have FREEZE` (`make wheelhouse`). Versions and hashes are the lock's; what FREEZE
names is taken to be there in whatever version. DeepSpeed, which publishes no wheel, is built. What does not fit the
limit is said: FAISS for GPUs gives way to FAISS for CPUs, which searches the same rows on the host.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import tyro
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path("requirements.lock")
PROJECT = "rerankvpr"
LEFT_OUT = ("mlflow", "torch")  # tracking is off in `make gpu`; PyTorch is there
TEST_TOOLS = ("pytest", "hypothesis")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
FAISS = ("faiss-gpu", "faiss-cpu")  # the first that fits, with all that it needs


@dataclass(frozen=True)
class Options:
    """Collects the wheels."""

    have: Path
    """Packages of the machine: `pip list --format=freeze`, or a name per line."""
    out: Path = Path("wheelhouse")
    """Folder for the wheels; what it holds is replaced."""
    python: str = "3.12"
    """Python of the machine."""
    limit_mb: float = 60
    """MiB in all."""


def locked(lock: str) -> dict[str, list[tuple[str, str]]]:
    """(version, marker) by package name of a lock's text."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lock.splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)==([^ ;\\]+)(?: *; *([^\\]*))?", line)
        if match:
            found.setdefault(canonicalize_name(match[1]), []).append((match[2], (match[3] or "").strip()))
    return found


def names_in(freeze: str) -> set[str]:
    """Package names of `pip list --format=freeze` or of a plain list."""
    lines = (line.partition("#")[0].strip() for line in freeze.splitlines())
    return {canonicalize_name(re.split(r"[=<>@ \[;]", line)[0]) for line in lines if line}


def project_roots() -> tuple[str, ...]:
    """What the project depends on, without what `make gpu` does not import and FAISS, and what its tests need."""
    named = [canonicalize_name(Requirement(line).name) for line in requires(PROJECT) or [] if "extra ==" not in line]
    return (*dict.fromkeys(name for name in named if name not in (*LEFT_OUT, *FAISS)), *TEST_TOOLS)


def needed(roots: Iterable[str], have: set[str], python: str) -> list[str]:
    """The roots and all that they need, by this environment's metadata, without what the machine has."""
    environment = {**{key: str(value) for key, value in default_environment().items()}, "extra": ""}
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    found: list[str] = []
    waiting = [canonicalize_name(root) for root in roots]
    while waiting:
        name = waiting.pop(0)
        if name in have or name in found:
            continue
        found.append(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            lines = []
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                waiting.append(canonicalize_name(requirement.name))
    return found


def version_of(name: str, lock: dict[str, list[tuple[str, str]]], python: str) -> str:
    """The locked version for a Linux machine of that Python. Raises SystemExit if the lock has none."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
    for version, marker in lock.get(name, []):
        if not marker or Requirement(f"x; {marker}").marker.evaluate(environment):  # type: ignore[union-attr]
            return version
    if name in FAISS:  # locked for other platforms; the same release serves this one
        return lock[name][0][0]
    raise SystemExit(f"wheelhouse: {name} is not in {LOCK}; run `make lock`")


def wheels_of(names: list[str], lock: dict[str, list[tuple[str, str]]], python: str, folder: Path) -> list[Path]:
    """The wheels of packages, downloaded or, for one that publishes none, built here. Raises SystemExit naming it."""
    target = ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    for platform in PLATFORMS:
        target += ["--platform", f"{platform}_x86_64"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels: list[Path] = []
    for name in names:
        wanted = f"{name}=={version_of(name, lock, python)}"
        place = folder / name
        asked = [*pip, "download", "--no-deps", *target, "--dest", str(place), wanted]
        if subprocess.run(asked, capture_output=True, check=False).returncode:
            build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), wanted]
            built = subprocess.run(build, capture_output=True, text=True, check=False)
            if built.returncode:
                raise SystemExit(f"wheelhouse: {wanted} has no wheel and cannot be built here:\n{built.stderr[-2000:]}")
        wheels += place.glob("*.whl")
    return wheels


def total_bytes(wheels: Iterable[Path]) -> int:
    """Bytes of some files."""
    return sum(wheel.stat().st_size for wheel in wheels)


def main() -> None:
    """Fills the folder and prints what is in it and what is not."""
    options = tyro.cli(Options, prog="python -m benchmarks.wheelhouse")
    if not options.have.is_file():
        raise SystemExit(f"wheelhouse: {options.have}: no such file; `pip list --format=freeze` there writes it")
    lock = locked(LOCK.read_text())
    have = names_in(options.have.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = wheels_of(needed(project_roots(), have, options.python), lock, options.python, folder)
        for faiss in FAISS:
            more = wheels_of(needed((faiss,), have, options.python), lock, options.python, folder)
            if total_bytes({*kept, *more}) <= options.limit_mb * 2**20:
                kept = sorted({*kept, *more})
                break
            print(f"left out: {faiss}, {total_bytes(more) / 2**20:.0f} MiB with what it needs")
        if (total := total_bytes(kept)) > options.limit_mb * 2**20:
            raise SystemExit(f"wheelhouse: {total / 2**20:.0f} MiB are needed, more than {options.limit_mb:g}")
        shutil.rmtree(options.out, ignore_errors=True)
        options.out.mkdir(parents=True)
        for wheel in kept:
            shutil.copy2(wheel, options.out)
    for wheel in sorted(options.out.iterdir()):
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{total / 2**20:7.2f} MiB in {options.out}")


if __name__ == "__main__":
    main()
