"""`rerankvpr demo`: from nothing to a table of recalls on an embedded data set."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from configs.load import load_recipe, recipe_text
from configs.schema import Recipe
from launch.torchrun import run as run_torchrun
from trainer.checkpoint import newest_valid
from trainer.progress import progress_bar
from trainer.tracking import open_command


@dataclass(frozen=True)
class DemoCommand:
    """Renders a town, shards it, trains on it and shows what was learned; what is valid from before is used again."""

    ranks: Annotated[int, tyro.conf.arg(name="nproc-per-node")] = 2
    """Processes to train and evaluate with."""
    seed: int = 0
    """Seed of the town."""


def main(argv: list[str]) -> int:
    """Runs the demo in the current folder."""
    command = tyro.cli(DemoCommand, args=argv, prog="rerankvpr demo")
    console, began = Console(), time.monotonic()
    recipe = load_recipe(Path("demo"))
    _render(console, recipe, command.seed)
    _shard(console, recipe)
    if _is_done(recipe):
        console.print(f"[bold]train[/]   {recipe.output} holds this training, finished: used again", highlight=False)
    else:
        found, _ = newest_valid(recipe.output / "checkpoints")
        go_on = f", going on from {found.name}" if found else ""
        console.print(f"[bold]train[/]   {recipe.output}, {command.ranks} ranks under torchrun{go_on}", highlight=False)
        status = run_torchrun([f"--nproc-per-node={command.ranks}"], ["train", "demo", "--resume"])
        if status:
            return status
    results = json.loads((recipe.output / "results.json").read_text())
    console.print(_table(results))
    console.print(f"pictures and checkpoints: {recipe.output}", highlight=False)
    console.print(f"all curves and pictures:  {_tool(open_command(recipe.tracking.uri))}", highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - began:.0f} s", highlight=False)
    return 0
