"""What `rerankvpr show` is asked: its flags, and what they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from configs.schema.section import local

OF_PATHS = ("folder:", "manifest:", "layout:")
Kind = Literal["attention", "pca", "matches", "similarity", "negatives", "drift", "sweep"]


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

    kind: Annotated[Kind, tyro.conf.Positional, tyro.conf.arg(metavar="KIND")]
    """What to draw: attention, pca, matches, similarity, negatives, drift or sweep."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WHAT...")]
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

    @property
    def what(self) -> list[Path]:
        """The words as paths. Raises ValueError for an address; a benchmark's colon is none of one."""
        return [Path(word) if word.startswith(OF_PATHS) else local(Path(word)) for word in self.images]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the evaluation, over those of the model."""
        return {} if self.image_size is None else {"image_size": self.image_size}

    @property
    def wants_pairs(self) -> bool:
        """Whether photographs are drawn two by two."""
        return self.kind == "matches"
