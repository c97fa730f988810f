"""`rerankvpr export`: a checkpoint's network for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from configs.flags import parse_flags
from configs.plugins import load_plugins


@dataclass(frozen=True)
class ExportCommand:
    """Writes the network of a checkpoint in the format that OUT ends in, with a model card beside it; needs no GPU.

    .safetensors: weights under the keys that the backbone is published with (facebookresearch/dinov2's), the
    aggregator's beginning with `aggregator.`, the recipe in the metadata; `rerankvpr.load`, `--model.weights FILE` and
    `eval --weights FILE` read it. .onnx, .pt2: a graph from images of one size to L2-normalised descriptors, for
    onnxruntime (extra onnx) and torch.export.load. No ending: a folder for huggingface_hub's from_pretrained.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A step folder, a run's output folder (its best checkpoint, else its newest), or an exported .safetensors."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File to write, ending in .safetensors, .onnx or .pt2, or a folder."""
    image_size: tuple[int, ...] = ()
    """Of a graph: side of its images, or height and width; the recipe's eval.image_size if not given."""
    input: Literal["uint8", "float"] = "uint8"
    """Of a graph: uint8 RGB, which it normalises, or floats that are normalised."""
    plugins: tuple[str, ...] = ()
    """Files (my_vpr.py) or modules that the network is made of; no code runs that is not named."""


def main(argv: list[str]) -> int:
    """Exports and says what was written."""
    command = parse_flags(ExportCommand, argv, prog="rerankvpr export")
    if not command.checkpoint.is_file():
        from trainer.checkpoint_folder import find_checkpoint

        find_checkpoint(command.checkpoint)  # a mistake should not wait for torch
    from data_pipeline.folder_lock import lock_of
    from trainer.export_formats import check_format, export_as

    check_format(command.out)
    load_plugins(command.plugins)
    console = Console()
    if note := _note_plugins(command.checkpoint):
        console.print(f"[yellow]{escape(note)}", soft_wrap=True, highlight=False)
    with lock_of(command.out, "rerankvpr export"), console.status("export") as status:
        done = export_as(
            command.checkpoint,
            command.out,
            image_size=command.image_size,
            takes=command.input,
            on_stage=lambda stage: status.update(f"export: {stage}"),
        )
    size = sum(file.stat().st_size for file in ([done.path] if done.path.is_file() else done.path.iterdir()))
    lines = [
        f"written: {done.path}, {done.recipe.model.backbone} with {done.recipe.model.aggregator} of {done.source}, "
        f"{done.numbers / 1e6:.1f} M numbers, {size / 2**20:.1f} MiB",
        *([done.note] if done.note else []),
        f"model card: {done.card}",
    ]
    for line in lines:
        console.print(escape(line), soft_wrap=True, highlight=False)
    return 0


def _note_plugins(source: Path) -> str:
    """A line on plug-ins of the source that were not run, or are other ones."""
    from trainer.checkpoint_folder import find_checkpoint
    from trainer.recorded_plugins import note_checkpoint, note_export

    return note_export(source) if source.is_file() else note_checkpoint(find_checkpoint(source))
