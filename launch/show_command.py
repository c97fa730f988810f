"""`rerankvpr show KIND WHAT...`: pictures of what a network sees, and of what a training or an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from configs.flags import parse_flags
from launch.show_run import Draw, Sweeping, draws_drift, draws_negatives, draws_sweep

SUFFIXES = (".png", ".svg", ".pdf")
OF_IMAGES = ("attention", "pca", "matches", "similarity")


@dataclass(frozen=True)
class ShowCommand:
    """Draws what a network sees of photographs, and what a training or an evaluation found.

    Of photographs, with --model. attention: CLS attention of each head, and their mean. pca: patches as colours, one
    colour one direction over all images. matches: what re-ranking matches of the first image with each of the others.
    similarity: one patch of the first image against all patches of each image.

    Of a training's folder. negatives: the hardest negatives that its queue gave, how alike and how old they were
    (trained with --trainer.log-negatives-every). drift: cosine of stored and present descriptors by age, beside the
    decay (trained with --memory.drift-every).

    sweep: recall over both thresholds of re-ranking, of a folder that `rerankvpr eval --sweep --out` wrote, or of a
    benchmark, with --model.
    """

    kind: Annotated[
        Literal["attention", "pca", "matches", "similarity", "negatives", "drift", "sweep"], tyro.conf.Positional
    ]
    """What to draw."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Photographs, or one folder of them; negatives, drift: a training's folder; sweep: an evaluation's folder, or a
    benchmark as --benchmarks of eval takes it."""
    model: str = ""
    """A run's folder, a checkpoint, an exported file, weights (.pth, .safetensors), a model in MLflow, or a backbone's
    name."""
    out: Path = Path("show.png")
    """File to write: .png, .svg or .pdf."""
    layer: int | None = None
    """Block that is read, negative from the last; attention: the last, otherwise the last but one."""
    facet: Literal["query", "key", "value"] = "value"
    """What of the block is read, for pca and similarity."""
    point: tuple[float, float] = (0.5, 0.5)
    """The patch of similarity: x and y in the first image, as shares of its width and height."""
    image_size: int | None = None
    """Side in pixels of the square that images are resized to; without it as the network was trained."""
    most: int = 8
    """Images of a folder that are drawn, evenly spread; negatives: pairs of photographs."""
    data_root: Path = Path("data")
    """Folder that holds a folder for each benchmark, for sweep."""
    plugins: tuple[str, ...] = ()
    """Your code, files or modules, that the network needs."""


def main(argv: list[str]) -> int:
    """Draws and names the file."""
    command = parse_flags(ShowCommand, argv, prog="rerankvpr show")
    if command.kind in OF_IMAGES and not command.model:
        raise ValueError("show needs --model: a run's folder, a checkpoint, a file of weights or a backbone's name")
    if command.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {command.out}: expected a name that ends with one of {', '.join(SUFFIXES)}")
    if command.most < 1:
        raise ValueError(f"--most {command.most}: expected 1 or more")
    draw = _draws(command)
    from configs.files import replacing

    command.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(command.out) as partial:
        drawn = partial.with_name(partial.name + command.out.suffix.lower())  # its suffix says what matplotlib writes
        said = draw(drawn)
        drawn.replace(partial)
    print(f"written: {command.out} ({said})")
    return 0


def _draws(command: ShowCommand) -> Draw:
    match command.kind:
        case "negatives":
            return draws_negatives(command.images, command.most)
        case "drift":
            return draws_drift(command.images)
        case "sweep":
            sweeping = Sweeping(command.model, command.data_root, command.plugins, _sized(command))
            return draws_sweep(command.images, sweeping)
        case _:
            return _draws_images(command)


def _sized(command: ShowCommand) -> dict[str, Any]:
    return {} if command.image_size is None else {"image_size": command.image_size}


def _draws_images(command: ShowCommand) -> Draw:
    images = _images(command)
    if command.kind == "matches" and len(images) < 2:
        raise ValueError("show matches needs two images or more: the query first, then its candidates")
    from eval.report import show
    from trainer.pretrained import load

    describer = load(command.model, plugins=command.plugins, **_sized(command))

    def draw(path: Path) -> str:
        if command.kind == "matches":
            show.draw_matches(path, describer, images[0], images[1:])
        else:
            default = -1 if command.kind == "attention" else -2
            layer = default if command.layer is None else command.layer
            seen = show.see(describer, images, layer=layer, facet=command.facet)
            if command.kind == "attention":
                show.draw_attention(path, seen)
            elif command.kind == "pca":
                show.draw_pca(path, seen)
            else:
                show.draw_similarity(path, seen, command.point)
        return f"{len(images)} images, {describer.pixels}"

    return draw


def _images(command: ShowCommand) -> list[Path]:
    from data_pipeline.photographs import list_photographs

    if len(command.images) != 1 or not command.images[0].is_dir():
        return list(command.images)
    (folder,) = command.images
    listing = list_photographs(folder)
    if not listing.names:
        raise ValueError(f"{folder}: no photographs there{f' ({listing.note()})' if listing.note() else ''}")
    step = max(1, len(listing.names) / command.most)
    chosen = [listing.names[int(number * step)] for number in range(min(command.most, len(listing.names)))]
    return [folder / name for name in chosen]
