"""`rerankvpr export`: a checkpoint's network as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from safetensors.torch import save_file

from configs.load import load_recipe, recipe_text
from trainer.checkpoint import checkpoint_weights, find_checkpoint


@dataclass(frozen=True)
class ExportCommand:
    """Writes the network of a checkpoint as one safetensors file, without a GPU and without DeepSpeed.

    The backbone has facebookresearch/dinov2's keys, the aggregator keys that begin with `aggregator.`, and the recipe
    is in the file's metadata. `--model.weights FILE` and `eval --weights FILE` read it.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A step folder, or a run's output folder (its best checkpoint, else its newest)."""
    out: Annotated[Path, tyro.conf.Positional]
    """File to write, ending in .safetensors."""


def main(argv: list[str]) -> int:
    """Exports and says what was written."""
    command = tyro.cli(ExportCommand, args=argv, prog="rerankvpr export")
    if command.out.suffix != ".safetensors":
        raise ValueError(f"export writes safetensors: {command.out} should end in .safetensors")
    checkpoint = find_checkpoint(command.checkpoint)
    from model.backbone import AGGREGATOR, facebook_layout

    weights = checkpoint_weights(checkpoint)
    backbone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    state = facebook_layout(backbone) | {key: value for key, value in weights.items() if key.startswith(AGGREGATOR)}
    recipe = load_recipe(checkpoint / "recipe.yaml")
    command.out.parent.mkdir(parents=True, exist_ok=True)
    partial = command.out.with_name(f".{command.out.name}.partial")
    metadata = {"format": "pt", "recipe": recipe_text(recipe), "checkpoint": checkpoint.name}
    save_file({key: value.contiguous() for key, value in state.items()}, partial, metadata=metadata)
    partial.replace(command.out)
    numbers = sum(value.numel() for value in state.values())
    Console().print(
        f"written: {command.out}, {recipe.model.backbone} with {recipe.model.aggregator} of {checkpoint}, "
        f"{numbers / 1e6:.1f} M numbers, {command.out.stat().st_size / 2**20:.1f} MiB",
        soft_wrap=True,
        highlight=False,
    )
    return 0
