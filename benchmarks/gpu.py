"""All that a GPU is needed for, in one command: the tests on the device, then the measurements, in under nine minutes.

`python -m benchmarks.gpu --out FOLDER` (`make gpu`). Each part is a process of its own with a limit of its own, and
`figures.json` and `table.txt` are written anew after each, so that what is done is kept whatever happens next. Without
a GPU the same parts run at reduced sizes on the CPU, which shows that they work and measures nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import tyro

from benchmarks.report import machine

LIBRARIES = ("torch", "torchvision", "deepspeed", "triton", "faiss-gpu", "faiss-cpu", "timm")


@dataclass(frozen=True)
class Options:
    """Runs the tests on the device and all measurements."""

    out: Path = Path("runs/gpu")
    """Folder for figures.json, table.txt and each part's output."""
    seconds: float = 530
    """All parts together; a part that has not started by then is not run."""
    parts: tuple[str, ...] = ()
    """Names of the parts to run; none is all of them."""
    small: bool = not torch.cuda.is_available()
    """Reduced sizes, as on a CPU."""


@dataclass(frozen=True)
class Part:
    """One process: a module with its arguments at full and at reduced size, and the seconds that it may take."""

    module: str
    full: str
    small: str
    limit_s: float


ON_DEVICE = "tests/test_device.py tests/test_nvjpeg.py tests/test_loader.py::test_nvjpeg_replaces_the_same_damaged_view"
# The most telling first: time may run out.
PARTS: dict[str, Part] = {
    "tests": Part("pytest", f"-q -ra {ON_DEVICE}", f"-q -ra {ON_DEVICE}", 200),
    "throughput": Part(
        "benchmarks.throughput",
        "--steps 10 --seconds 60 --compiled False",
        "--backbones tiny14 --image-size 42 --steps 2 --precision fp32 --compiled False --queue 64",
        110,
    ),
    "loss": Part(
        "benchmarks.memory_loss", "--sizes 1024x65536x768 4096x262144x768", "--sizes 32x256x16 --repeats 1", 70
    ),
    "loader": Part(
        "benchmarks.step",
        "--ranks 1 --places 60 --backbone vitb14 --precision bf16",
        "--ranks 1 --places 2 --steps 2 --size 64 --backbone tiny14",
        70,
    ),
    "memory": Part("benchmarks.giant", "--seconds 60", "--cases tiny14 --ranks 1", 90),
    "inference": Part(
        "benchmarks.inference",
        "",
        "--backbone tiny14 --image-size 70 --batch 2 --precision fp32 --top 3 --queries 2 --rows 5000 "
        "--block-rows 2000 --size 16 --search-queries 4 --repeats 1",
        90,
    ),
    "compiled": Part(
        "benchmarks.throughput",
        "--steps 10 --seconds 60 --compiled True --trained last4",
        "--backbones tiny14 --image-size 42 --steps 1 --precision fp32 --compiled True --trained last4 --queue 64 "
        "--compile-backend eager",
        150,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    status: str
    seconds: float
    output: str
    figures: dict[str, float]


def run_part(name: str, part: Part, options: Options, limit_s: float) -> Outcome:
    """Runs one part; its process group is killed at the limit, and the figures that it had written are kept."""
    arguments = (part.small if options.small else part.full).split()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        if part.module != "pytest":
            arguments += ["--json", str(figures)]
        with (options.out / f"{name}.txt").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", part.module, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "RERANKVPR_TEST_GPU": "1"},
            )
            try:
                code = process.wait(timeout=limit_s)
                status = "ok" if code == 0 else f"ended with status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"stopped after {limit_s:.0f} s"
        found = json.loads(figures.read_text()) if figures.exists() else {}
    text = (options.out / f"{name}.txt").read_text()
    return Outcome(status, time.monotonic() - began, text, {f"{name}/{key}": value for key, value in found.items()})


def installed(name: str) -> bool:
    """Whether a distribution is there."""
    with suppress(PackageNotFoundError):
        version(name)
        return True
    return False


def header() -> list[str]:
    """Machine, driver and library versions."""
    driver = "no nvidia-smi"
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
        driver = answer.stdout.strip() or answer.stderr.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    known = ", ".join(f"{name} {version(name)}" for name in LIBRARIES if installed(name))
    return [time.strftime("%Y-%m-%d"), machine(), f"driver: {driver}", known]


def main() -> None:
    """Runs the parts and prints all that they printed; the status is 1 if one did not end well."""
    options = tyro.cli(Options, prog="python -m benchmarks.gpu")
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        raise SystemExit(f"benchmarks.gpu: no part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [*header(), "" if not options.small else "REDUCED SIZES: shows that the parts work, measures nothing", ""]
    figures: dict[str, float] = {}
    began, failed = time.monotonic(), []
    for name in options.parts or PARTS:
        left = options.seconds - (time.monotonic() - began)
        if left < 5:
            lines.append(f"== {name}: not run, out of time")
            failed.append(name)
            continue
        print(f"{name} ...", flush=True)
        limit_s = left if options.small else min(left, PARTS[name].limit_s)
        outcome = run_part(name, PARTS[name], options, limit_s)
        if outcome.status != "ok":
            failed.append(name)
        figures |= outcome.figures | {f"{name}/seconds": outcome.seconds}
        lines += [f"== {name}: {outcome.status}, {outcome.seconds:.0f} s", outcome.output.rstrip(), ""]
        (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        (options.out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if failed:
        raise SystemExit(f"benchmarks.gpu: {', '.join(failed)} did not end well; see {options.out}")


if __name__ == "__main__":
    main()
