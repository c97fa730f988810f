"""`rerankvpr export`: a checkpoint's network as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from configs.flags import parse_flags
from configs.plugins import load_plugins


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
    plugins: tuple[str, ...] = ()
    """Files (my_vpr.py) or modules of the training; without them the weights are exported, and no code is run."""


def main(argv: list[str]) -> int:
    """Exports and says what was written."""
    command = parse_flags(ExportCommand, argv, prog="rerankvpr export")
    if command.out.suffix != ".safetensors":
        raise ValueError(f"export writes safetensors: {command.out} should end in .safetensors")
    from trainer.checkpoint_folder import find_checkpoint

    checkpoint = find_checkpoint(command.checkpoint)
    from trainer.export import export_network
    from trainer.recorded_plugins import note_checkpoint

    load_plugins(command.plugins)
    if note := note_checkpoint(checkpoint):
        Console().print(f"[yellow]{escape(note)}", soft_wrap=True, highlight=False)
    done = export_network(checkpoint, command.out)
    Console().print(
        f"written: {done.file}, {done.recipe.model.backbone} with {done.recipe.model.aggregator} of {checkpoint}, "
        f"{done.numbers / 1e6:.1f} M numbers, {done.file.stat().st_size / 2**20:.1f} MiB",
        soft_wrap=True,
        highlight=False,
    )
    return 0
