"""A training step of this tree against one of an earlier revision: the same training with both, in turns, in one run.

Measured is what each training logs of itself, `train/step_s` without `train/data_wait_s`: from a batch that is there
to the logged step. The earlier revision is unpacked in the temporary folder; it reads the same recipe and shards.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from benchmarks.giant import write_noise
from benchmarks.report import print_table, write_json

ROOT = Path(__file__).resolve().parents[1]
WARM = 3
VIEWS = 4


@dataclass(frozen=True)
class Options:
    """Trains with this tree and with an earlier revision, in turns, and prints the ratio of a step's seconds."""

    revision: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REVISION")]
    """What git knows the earlier tree by: a commit, a branch, a tag."""
    turns: int = 4
    """Trainings with each tree."""
    steps: int = 10
    """Measured steps of a training, after three that warm up."""
    backbone: str = "vits14"
    """Backbone, random weights, last 4 blocks trained."""
    image_size: int = 112
    """Side of an image in pixels."""
    places: int = 8
    """Places of a step, of 4 images each."""
    ranks: int = 1
    """Ranks of each training."""
    host: bool = False
    """The host's own time instead: tiny14, 15 places, images of one patch (14 px), next to no arithmetic."""
    json: Path | None = None
    """File for the figures."""


@dataclass
class Tree:
    """A tree of the project, and what trainings with it have logged."""

    name: str
    folder: Path
    seconds: list[float] = field(default_factory=list)  # median of each training
    losses: list[float] = field(default_factory=list)  # the last of each


def unpack(revision: str, folder: Path) -> str:
    """Puts the tree of a revision into `folder`; its short commit. Raises SystemExit if git has none."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "--verify", "--end-of-options", f"{revision}^{{commit}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        why = "is no checkout of git" if "not a git repository" in found.stderr else f"has no revision {revision}"
        raise SystemExit(f"benchmarks.against: {ROOT} {why}; expected a commit, branch or tag of this project")
    commit = found.stdout.strip()
    folder.mkdir()
    archive = subprocess.Popen([*git, "archive", "--format=tar", commit], stdout=subprocess.PIPE)
    unpacked = subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=False).returncode
    if archive.wait() or unpacked:
        raise SystemExit(f"benchmarks.against: {revision} could not be unpacked in {folder}; is the disk full?")
    if not (folder / "rerankvpr.py").exists():
        raise SystemExit(f"benchmarks.against: {revision} has no rerankvpr.py, so it trains nothing this way")
    return commit


def write_recipe(options: Options, folder: Path) -> Path:
    """The recipe of all trainings, of noise: nothing is evaluated, and a checkpoint comes after the last step alone."""
    recipe = {
        "name": "against",
        "data": {
            **{"shards": str(folder / "shards"), "places_per_batch": options.places, "images_per_place": VIEWS},
            **{"image_size": options.image_size, "composition": "mixed", "decode_threads": 1},
        },
        "model": {"backbone": options.backbone, "weights": "random", "finetune_last_n_blocks": 4},
        "memory": {"size": 512, "start_epoch": 0, "decay_lambda": 0.1},
        "trainer": {
            **{"epochs": 10**6, "max_steps": WARM + options.steps},
            **{"validate_every_epochs": 0, "checkpoint_every_steps": 10**6},
        },
        "tracking": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(tree: Tree, recipe: Path, output: Path, ranks: int) -> None:
    """Adds a training to what the tree has logged. Raises SystemExit with the last line of one that fails."""
    command = [sys.executable, "-m", "rerankvpr", "train", str(recipe), "--output", str(output)]
    if ranks > 1:
        command[3:4] = ["launch", "--nproc-per-node", str(ranks), "--", "train"]
    environment = {**os.environ, "PYTHONPATH": str(tree.folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree.folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["nothing"]
        line = next((line for line in said if line.startswith("rerankvpr: ")), said[-1])
        raise SystemExit(
            f"benchmarks.against: the training with {tree.name} ended with status {done.returncode}: {line}"
        )
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in logged if "train/step_s" in metrics]
    tree.seconds.append(statistics.median(step["train/step_s"] - step["train/data_wait_s"] for step in steps[WARM:]))
    tree.losses.append(steps[-1]["train/loss"])


def compare(before: Tree, after: Tree, options: Options) -> dict[str, float]:
    """Prints both trees and the ratio; returns the figures."""
    rows = []
    for tree in (before, after):
        taken = tree.seconds
        spread = f"{1e3 * min(taken):.1f} to {1e3 * max(taken):.1f}"
        losses = ", ".join(sorted({repr(loss) for loss in tree.losses}))
        rows.append([tree.name, f"{1e3 * statistics.median(taken):.1f}", spread, losses])
    ratios = [b / a for a, b in zip(before.seconds, after.seconds, strict=True)]
    ratio = statistics.median(after.seconds) / statistics.median(before.seconds)
    rows.append(["ratio", f"{ratio:.3f}", f"{min(ratios):.3f} to {max(ratios):.3f} in a turn", ""])
    title = (
        f"milliseconds of a step without the wait for data: {options.backbone}, {options.image_size} px, "
        f"{options.places} places x {VIEWS}, {options.ranks} rank(s), one thread each; "
        f"median of {options.steps} steps, {options.turns} trainings with each tree in turns"
    )
    print_table(title, ["", "median", "of trainings", f"loss of step {WARM + options.steps}"], rows)
    differs = max(abs(b - a) for a, b in zip(before.losses, after.losses, strict=True))
    print(
        f"the last losses differ by up to {differs:.3g}" if differs else "the last losses are equal, to the last digit"
    )
    return {
        **{"before_ms": 1e3 * statistics.median(before.seconds), "after_ms": 1e3 * statistics.median(after.seconds)},
        **{"ratio": ratio, "ratio_least": min(ratios), "ratio_most": max(ratios)},
        **{"loss_before": before.losses[-1], "loss_after": after.losses[-1]},
    }


def main() -> None:
    """Runs the turns; who goes first changes from one to the next."""
    options = tyro.cli(Options)
    if min(options.turns, options.steps, options.places, options.ranks) < 1:
        raise SystemExit("benchmarks.against: --turns, --steps, --places and --ranks must be at least 1")
    if options.host:
        options = replace(options, backbone="tiny14", image_size=14, places=15)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the temporary folder would stay
    with tempfile.TemporaryDirectory(prefix="rerankvpr-against-") as name:
        folder = Path(name)
        commit = unpack(options.revision, folder / "before")
        before, after = Tree(f"before ({commit})", folder / "before"), Tree("after (this tree)", ROOT)
        write_noise(folder, places=4 * options.places, size=(28, 28) if options.host else (160, 120))
        recipe = write_recipe(options, folder)
        for turn in range(options.turns):
            for tree in (before, after) if turn % 2 == 0 else (after, before):
                train(tree, recipe, folder / f"{tree.folder.name}-{turn}", options.ranks)
                print(f"turn {turn + 1} of {options.turns}, {tree.name}: {1e3 * tree.seconds[-1]:.1f} ms", flush=True)
    write_json(options.json, compare(before, after, options))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
