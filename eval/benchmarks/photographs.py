"""The photographs of a benchmark's folders: every file is used, or counted with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.photographs import SUFFIXES, list_photographs
from eval.benchmarks.ground_truth import read_lines


@dataclass(frozen=True)
class Photographs:
    """Photographs of one folder by name, and what is to be said of the others."""

    paths: list[Path]
    notes: tuple[str, ...] = ()


def images_in(folder: Path, *, deep: bool = False) -> Photographs:
    """Photographs of a folder by name; `<folder>_images_paths.txt` beside it, where there, spares the walk.

    Raises FileNotFoundError naming the folder if it holds none.
    """
    listing = folder.with_name(f"{folder.name}_images_paths.txt")
    if listing.is_file():
        names = read_lines(listing, words=False)
        paths = sorted(folder.parent / name if name.startswith(f"{folder.name}/") else folder / name for name in names)
        note = f"the images of {folder.name}/ are those that {listing.name} names; others were not looked for"
    else:
        if not folder.is_dir():
            raise FileNotFoundError(f"no images: there is no folder {folder}")
        found = list_photographs(folder, deep=deep)
        paths = sorted(folder / name for name in found.names)
        note = f"{folder.name}/: {found.note()}" if found.note() else ""
        if not paths:
            raise FileNotFoundError(f"no images in {folder}{f' ({found.note()})' if note else ''}; {_read()}")
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: {listing} names none")
    return Photographs(paths, (note,) if note else ())


def _read() -> str:
    return f"files that are read end in {', '.join(sorted(SUFFIXES))}"


def existing(paths: Sequence[Path], source: Path) -> list[Path]:
    """The paths, all of which exist. Raises FileNotFoundError naming the first that does not, and how many."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} names {len(missing)} of {len(paths)} images that are not there: {missing[0]}"
        )
    return list(paths)
