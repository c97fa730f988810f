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

from configs.flags import parse_flags
from configs.load import load_recipe, recipe_text
from configs.schema import Recipe
from launch.fork_server import gpu_in_dev
from launch.torchrun import run as run_torchrun
from trainer.mlflow_sender import read_state
from trainer.progress import progress_bar
from trainer.tracking import open_command, where_shown


@dataclass(frozen=True)
class DemoCommand:
    """Renders a town, shards it, trains on it and shows what was learned; what is valid from before is used again."""

    ranks: Annotated[int | None, tyro.conf.arg(name="nproc-per-node")] = None
    """Processes to train and evaluate with; by default two, or one where there is one GPU."""
    seed: int = 0
    """Seed of the town."""


def main(argv: list[str]) -> int:
    """Runs the demo in the current folder."""
    command = parse_flags(DemoCommand, argv, prog="rerankvpr demo")
    from trainer.checkpoint_folder import newest_valid

    console, began = Console(), time.monotonic()
    recipe = load_recipe(Path("demo"))
    _render(console, recipe, command.seed)
    _shard(console, recipe)
    if _is_done(recipe):
        console.print(f"[bold]train[/]   {recipe.output} holds this training, finished: used again", highlight=False)
    else:
        found, _ = newest_valid(recipe.output / "checkpoints")
        ranks, go_on = command.ranks or _ranks_here(), f", going on from {found.name}" if found else ""
        said = f"{ranks} rank{'s' if ranks > 1 else ''} under torchrun{go_on}"
        console.print(f"[bold]train[/]   {recipe.output}, {said}", highlight=False)
        status = run_torchrun([f"--nproc-per-node={ranks}"], ["train", "demo", "--resume"])
        if status:
            return status
    results = json.loads((recipe.output / "results.json").read_text())
    if (report := recipe.output / "report.html").is_file():
        console.print(f"[bold]report[/]  {report}: open it in a browser", highlight=False)
    console.print(_table(results))
    for line in _next_steps(recipe):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{time.monotonic() - began:.0f} s", highlight=False)
    return 0


def _render(console: Console, recipe: Recipe, seed: int) -> None:
    from data_pipeline.town.render import Town, render_town, town_is_current

    folder, town = recipe.eval.data_root / "town", Town(seed=seed)
    if not (reused := town_is_current(folder, town)):
        with progress_bar(console, "town", town.images) as update:
            render_town(folder, town, on_progress=update)
    what = f"{town.places} places, {town.held_out_places} held out, {town.images:,} images"
    console.print(f"[bold]town[/]    {folder}: {what}; {'used again' if reused else 'rendered'}", highlight=False)


def _shard(console: Console, recipe: Recipe) -> None:
    from launch.data_commands import ShardCommand, describe_shards, write_shard_set

    command = ShardCommand(source=recipe.eval.data_root / "town" / "train", out=Path(recipe.data.shards), shard_mb=4)
    describe_shards(console, write_shard_set(console, command))


def _ranks_here() -> int:
    """Two, to show what several do; one where there is one GPU, which two ranks cannot share."""
    if not gpu_in_dev():
        return 2
    import torch

    return min(2, torch.cuda.device_count()) or 2


def _is_done(recipe: Recipe) -> bool:
    """Whether the output folder holds this very recipe, trained to its end and whole."""
    stored, results = recipe.output / "recipe.yaml", recipe.output / "results.json"
    if not (stored.is_file() and results.is_file() and stored.read_text() == recipe_text(recipe)):
        return False
    from trainer.checkpoint_folder import newest_valid

    found, _ = newest_valid(recipe.output / "checkpoints")
    return found is not None and json.loads(results.read_text()).get("model", "").endswith(found.name)


def _table(results: dict[str, Any]) -> Table:
    """Untrained, trained, trained and re-ranked, side by side with their cost."""
    (before,), (after,) = results["before"], results["results"]
    counts = f"{after['num_queries']} queries in {after['num_database']} images"
    title = f"{after['name']}: {after['protocol']}, {counts}; recall in %"
    if after.get("rerank_rule"):
        title += f"\nre-ranked: {after['rerank_rule']}"
    table = Table(title=title)
    table.add_column("")
    for column in (
        *(f"R@{k}" for k in after["recall"]),
        "features\ns/image\nimages/s",
        "retrieval\ns/query",
        "re-rank\ns/query",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    stages = (
        ("untrained", before, "recall"),
        ("trained", after, "recall"),
        ("trained + re-ranked", after, "recall_reranked"),
    )
    for label, result, key in stages:
        timings = result["timings"]
        rerank = f"{timings['rerank_s_per_query']:.5f}" if key == "recall_reranked" else "-"
        costs = [f"{timings[name]:.5f}" for name in ("extraction_s_per_image", "retrieval_s_per_query")]
        costs[0] += f"\n({1 / timings['extraction_s_per_image']:,.0f})"
        table.add_row(label, *(f"{v:.1f}" for v in result[key].values()), *costs, rerank)
    gains = (f"{after['gain'][k][0]:+.1f}" for k in after["recall"])
    table.add_row("gain by re-ranking", *gains)
    return table


def _next_steps(recipe: Recipe) -> list[str]:
    """What to try next: lines that fit 80 columns, each command on a line of its own to copy."""
    run, town = recipe.output, recipe.eval.data_root / "town"
    steps = {
        "See what the network looks at:": [f"rerankvpr show attention {town} --model {run}"],
        "Ask where a photograph was taken:": [
            f"rerankvpr index build town --checkpoint {run} --out runs/town",
            f"rerankvpr locate {town}/images/test/queries --index runs/town",
        ],
        "Train on your own photographs (docs/own_city.md):": [
            "rerankvpr shard photos PHOTOS data/mine --convert",
            "rerankvpr train mine",
        ],
        "All curves, in MLflow:": _curves(recipe),
    }
    lines = ["", "What next?"]
    for what, commands in steps.items():
        lines += [what, *(f"  {_tool(command)}" for command in commands)]
    return lines


def _curves(recipe: Recipe) -> list[str]:
    """The command that serves the curves, and the address of the experiment if the training was sent."""
    experiment = read_state(recipe.output).get("experiment_id")
    if not (isinstance(experiment, str) and experiment):
        return [open_command(recipe.tracking.uri)]
    return list(reversed(where_shown(recipe.tracking.uri, experiment).values()))


def _tool(command: str) -> str:
    """A command of this environment, with the folder of its programs where that is not on the path."""
    import shutil
    import sys

    program, _, rest = command.partition(" ")
    if not rest or shutil.which(program):
        return command
    bin_folder = Path(sys.executable).parent
    shown = bin_folder.relative_to(Path.cwd()) if bin_folder.is_relative_to(Path.cwd()) else bin_folder
    return f"{shown / program} {rest}"
