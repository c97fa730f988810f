"""`rerankvpr plan`: what a training would take, before anything is started."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.recipe_flags import RecipeCommand, parse_over_recipe


@dataclass(frozen=True)
class PlanCommand(RecipeCommand):
    """Prints what a training of RECIPE would take: memory of a rank by part, steps, bytes sent, time; starts nothing.

    Refuses what the training would refuse (a name, an argument or a size that does not exist or fit, a benchmark or
    shard set that is damaged) and what no rank has the memory for. Shards, benchmarks and weights that are not on this
    machine are named.
    """

    ranks: int | None = None
    """Ranks of the training; by default WORLD_SIZE, else 1."""
    device_gb: float | None = None
    """Memory of a rank's GPU in GB; by default this machine's."""
    tflops: float | None = None
    """TFLOP/s that a rank sustains; by default 20 % of the GPU's peak, or what this CPU is measured at."""
    json: Path | None = None
    """File to write the figures to."""

    def __post_init__(self) -> None:
        for name in ("ranks", "device_gb", "tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number above 0")


def main(argv: list[str]) -> int:
    """Prints the plan; the status is 2 if the training would be refused."""
    command, notes = parse_over_recipe(PlanCommand, argv, verb="plan")
    for note in notes:
        print(f"rerankvpr: {note}", file=sys.stderr)
    # torch is loaded here, not for help.
    from rich.console import Console

    from configs.files import write_whole
    from trainer.fit import fitted
    from trainer.plan import Assumed, check_fit, plan, print_plan
    from trainer.preflight import check_training

    recipe, lowered = fitted(command.recipe)
    for note in lowered:
        print(f"rerankvpr: {note}", file=sys.stderr)
    ranks = command.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    absent = check_training(recipe, ranks, resume=True)
    planned = plan(recipe, Assumed(ranks, command.device_gb, command.tflops))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    print_plan(planned, console)
    for line in absent:
        console.print(f"[yellow]not here: {line}", highlight=False, soft_wrap=True)
    if command.json:
        write_whole(command.json, json.dumps(planned.figures(), indent=1) + "\n")
    check_fit(planned)
    return 0
