"""`rerankvpr show KIND WHAT...`: pictures of what a network sees, and of what a training or an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from configs.flags import parse_flags
from configs.schema.section import local
from launch.show_images import OF_PATHS, Asked, choose
from launch.show_run import Draw, Sweeping, draws_drift, draws_negatives, draws_sweep

SUFFIXES = (".png", ".svg", ".pdf")
OF_IMAGES = ("attention", "pca", "matches", "similarity")


@dataclass(frozen=True)
class ShowCommand:
    """Draws what a network sees of photographs, and what a training or an evaluation found.

    attention, pca, matches and similarity take photographs, a folder of them, a benchmark, or a run's folder.
    attention: where the class token looks, by head and in the mean. pca: patches as colours, one scale for all images.
    matches: what re-ranking matches between the first image and each of the others. similarity: one patch of the first
    image against all patches of each image.

    With --index these draw a photograph beside what the index finds for it, or several photographs, each beside its
    first candidate; without a photograph, some of the index itself.

    negatives and drift take a training's folder. negatives: the hardest negatives of its queue, how alike and how old
    they were (trained with --trainer.log-negatives-every). drift: cosine of stored and present descriptors by age,
    beside the decay (trained with --memory.drift-every).

    sweep takes a folder that `rerankvpr eval --sweep --out` wrote, or a benchmark with --model: recall over both
    thresholds of re-ranking.

    rerankvpr show attention a.jpg b.jpg --model runs/demo --out attention.png

    rerankvpr show matches query.jpg --index city.index --out matches.png
    """

    kind: Annotated[
        Literal["attention", "pca", "matches", "similarity", "negatives", "drift", "sweep"], tyro.conf.Positional
    ]
    """What to draw."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Photographs, one folder of them, a benchmark as eval's --benchmarks names it (queries, each with one of its
    positives), or a run's folder (the first benchmark of its recipe). For negatives and drift a training's folder; for
    sweep an evaluation's folder, or a benchmark."""
    model: str = ""
    """A run's folder, a checkpoint, an exported file, weights (.pth, .safetensors), a model in MLflow, or a backbone's
    name."""
    index: Path | None = None
    """Folder that `rerankvpr index build` wrote, whose network is used; for attention, pca, matches and similarity."""
    out: Path = Path("show.png")
    """File to write: .png, .svg or .pdf."""
    layer: int | None = None
    """Block to read, from the end if negative. By default the last for attention, else the last but one."""
    facet: Literal["query", "key", "value"] = "value"
    """Facet of the block that pca and similarity read."""
    point: tuple[float, float] = (0.5, 0.5)
    """Where the patch of similarity is in the first image: x and y, as shares of its width and height."""
    image_size: int | None = None
    """Side in pixels of the square that images are resized to; by default the size that the network was trained at."""
    most: int = 8
    """How many to draw at most: images of a folder, benchmark or index, evenly spread; pairs for matches, negatives."""
    data_root: Path = Path("data")
    """Folder that holds a folder for each benchmark."""
    plugins: tuple[str, ...] = ()
    """Your code, files or modules, that the network needs."""


def main(argv: list[str]) -> int:
    """Draws and names the file."""
    command = parse_flags(ShowCommand, argv, prog="rerankvpr show")
    if command.index and command.kind not in OF_IMAGES:
        raise ValueError(f"--index does not go with show {command.kind}; it is of {', '.join(OF_IMAGES)}")
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
    what = tuple(_path(word) for word in command.images)
    match command.kind:
        case "negatives":
            return draws_negatives(what, command.most)
        case "drift":
            return draws_drift(what)
        case "sweep":
            sweeping = Sweeping(command.model, command.data_root, command.plugins, _sized(command))
            return draws_sweep(what, sweeping)
        case _:
            return _draws_images(command, what)


def _path(word: str) -> Path:
    """A word as a path; a benchmark's colon is none of an address."""
    return Path(word) if word.startswith(OF_PATHS) else local(Path(word))


def _sized(command: ShowCommand) -> dict[str, Any]:
    return {} if command.image_size is None else {"image_size": command.image_size}


def _draws_images(command: ShowCommand, what: tuple[Path, ...]) -> Draw:
    asked = Asked(
        kind=command.kind,
        what=what,
        model=command.model,
        index=command.index,
        most=command.most,
        data_root=command.data_root,
        plugins=command.plugins,
        settings=_sized(command),
    )
    chosen = choose(asked)
    from eval.report import show

    def draw(path: Path) -> str:
        if command.kind == "matches":
            show.draw_matches(path, chosen.describer, chosen.pairs)
        else:
            default = -1 if command.kind == "attention" else -2
            layer = default if command.layer is None else command.layer
            seen = show.see(chosen.describer, chosen.images, layer=layer, facet=command.facet)
            if command.kind == "attention":
                show.draw_attention(path, seen)
            elif command.kind == "pca":
                show.draw_pca(path, seen)
            else:
                show.draw_similarity(path, seen, command.point)
        return str(chosen)

    return draw
