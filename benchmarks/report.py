"""What the measurements share: the machine in one line, the table, the flat JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def machine() -> str:
    """The hardware and library versions that a figure belongs to, in one line."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores of {cpu}, {gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows` under `columns`, after the line that names the machine."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(machine(), highlight=False, soft_wrap=True)
    console.print(table)


def figures_of(command: Sequence[str], what: str, env: Mapping[str, str] | None = None) -> dict[str, float]:
    """The figures that a process prints as its last line; `what` names it if it ends otherwise."""
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} ended with status {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def write_json(path: Path | None, figures: Mapping[str, float]) -> None:
    """Writes the figures as a flat JSON object, if a path was given."""
    if path:
        path.write_text(json.dumps(dict(figures), indent=1) + "\n")
