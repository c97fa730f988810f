"""Any two folders of photographs, and how they lie in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configs.reading import reason
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, Whereabouts, without_labels
from eval.benchmarks.camera import by_camera
from eval.benchmarks.layouts import vpr_bench
from eval.benchmarks.photographs import images_in
from eval.benchmarks.places import by_radius, of_utm_names, spread

BASES = ("images/test", "images/val", "images/train", "", "test", "val", "train")
PARTS = (("database", "queries"), ("database", "query"), ("ref", "query"), ("gallery", "queries"))
GROUND_TRUTH = "ground_truth_new.npy"
LISTED = "as ground_truth_new.npy lists them, all queries"
_SHOWN = 6


@dataclass(frozen=True)
class Pair:
    """Two folders below another: that of the database and that of the queries."""

    base: str
    database: str
    queries: str

    def __str__(self) -> str:
        return f"{self.base}/{{{self.database},{self.queries}}}".removeprefix("/")


def pairs_in(folder: Path) -> list[Pair]:
    """The pairs of folders that `folder` has, the one that is read first."""
    return [
        Pair(base, database, queries)
        for base in BASES
        for database, queries in PARTS
        if (folder / base / database).is_dir() and (folder / base / queries).is_dir()
    ]


def any_folder(name: str, folder: Path, radius_m: float | None = None, *, labels: bool = True) -> Benchmark:
    """The photographs of a folder that has them in one of the pairs of `pairs_in`, with the ground truth that it has.

    That is `ground_truth_new.npy` beside the two, or else positions in names. Raises FileNotFoundError saying what the
    folder has, ValueError for a radius where ground truth is listed.
    """
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file, no folder of photographs; manifest:FILE reads a table")
    pairs = pairs_in(folder)
    if not pairs:
        wanted = " | ".join(f"{{{database},{queries}}}/" for database, queries in PARTS)
        raise FileNotFoundError(
            f"{folder} has none of {wanted}, itself or in images/test, images/val; it has {_content(folder)}. "
            "Folders of other names: --database DIR --queries DIR"
        )
    pair = pairs[0]
    root = folder / pair.base
    listed = (root / GROUND_TRUTH).is_file()
    if listed and labels and radius_m is not None:
        raise ValueError(
            f"{root / GROUND_TRUTH} lists the ground truth; a radius of {radius_m:g} m means nothing to it"
        )
    if listed and labels:
        benchmark = vpr_bench(name, root, LISTED, database=pair.database, queries=pair.queries)
    else:
        benchmark = two_folders(name, root / pair.database, root / pair.queries, radius_m or RADIUS_M, labels=labels)
    others = [f"{other}" for other in pairs[1:]]
    notes = [f"{', '.join(others)} of the same folder are not read (folder:PATH names one)"] if others else []
    said = f"{pair}, {GROUND_TRUTH}" if listed and labels else f"{pair}, {benchmark.layout}"
    return replace(benchmark, layout=said, notes=(*notes, *benchmark.notes))


def two_folders(
    name: str, database: Path, queries: Path, radius_m: float = RADIUS_M, *, labels: bool = True
) -> Benchmark:
    """The photographs of two folders and their sub-folders; positives lie within `radius_m` metres.

    Positions are those of names like @UTM_east@UTM_north@..., or if no file has such a name, of GPS in EXIF; a query
    without a position has no ground truth.
    """
    found = [images_in(folder, deep=True) for folder in (database, queries)]
    notes = [note for part in found for note in part.notes]
    images = (found[0].paths, found[1].paths)
    placed = [np.array([path.name.startswith("@") for path in paths]) for paths in images]
    if not any(part.any() for part in placed):
        benchmark, source = by_camera(name, *images, radius_m, notes, labels=labels)
        return replace(benchmark, layout=f"names without positions, {source}")
    layout = "@UTM_east@UTM_north@ in names"
    try:
        at, odd = _positions(images, placed)
    except ValueError as error:
        if labels:
            raise
        benchmark = without_labels(name, *images, [*notes, f"positions are not used ({reason(error)})"])
        return replace(benchmark, layout=layout)
    return replace(by_radius(name, *images, at, radius_m, [*notes, *odd]), layout=layout)


def _positions(images: Sequence[Sequence[Path]], placed: Sequence[np.ndarray]) -> tuple[Whereabouts, list[str]]:
    named = [[path for path, has in zip(*part, strict=True) if has] for part in zip(images, placed, strict=True)]
    at, notes = of_utm_names(*named)
    return Whereabouts(spread(at.database, placed[0]), spread(at.queries, placed[1])), notes


def _content(folder: Path) -> str:
    """What a folder holds, for a person who gave the wrong one."""
    inside = sorted(folder.iterdir())
    folders = [f"{path.name}/" for path in inside if path.is_dir()]
    files = sum(not path.is_dir() for path in inside)
    shown = [*folders[:_SHOWN], *(["..."] if len(folders) > _SHOWN else [])]
    return ", ".join([*shown, *([f"{files} files"] if files else [])]) or "nothing"
