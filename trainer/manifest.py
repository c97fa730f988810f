"""What a checkpoint's folder must hold: the files that its manifest lists, all that a resume needs, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.reading import read_regular

MANIFEST = "manifest.json"
FORMAT = 3
NEEDED = ("state.json", "recipe.yaml", "optimizer.json")
PARTED = ("model", "optimizer", "random", "queue")  # a file for each rank, or each shard of the queue; see `_parts`
HARD_PLACES = "hard_places.safetensors"  # the steps of the epoch that are composed so far
OPTIONAL = ("drift.safetensors", "plugins.json", HARD_PLACES)

_PART = re.compile(r"(?P<kind>[a-z]+)-(?P<rank>\d{5})-of-(?P<world>\d{5})(?:\.(?P<piece>\d{3,}))?\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says which and why."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a step folder, its form checked: `files` holds size and digest by name, `world_size` ranks.

    Raises CheckpointError.
    """
    file = checkpoint / MANIFEST
    try:
        manifest = json.loads(read_regular(file))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST}: it is no checkpoint, or was cut off while it was written"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is no manifest: expected a mapping with format and files")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} has format {manifest.get('format')!r:.40}; this version reads {FORMAT}")
    files, world = manifest.get("files"), manifest.get("world_size")
    if not isinstance(world, int) or isinstance(world, bool) or not 1 <= world <= 99_999:
        raise CheckpointError(f"{file}: world_size is {world!r:.40}; expected the number of ranks")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{file} lists no files: it describes no checkpoint")
    for name, about in files.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise CheckpointError(f"{file} names {name!r:.60}; expected names of files in its own folder")
        if not isinstance(about, dict) or not isinstance(about.get("bytes"), int) or "sha256" not in about:
            raise CheckpointError(f"{file}: {name} has no size or digest")
    return manifest


def faults(checkpoint: Path) -> list[str]:
    """What differs between a checkpoint, its manifest and what a resume needs; empty if it is whole."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    listed = manifest["files"]
    found = _not_needed(checkpoint, listed) + _missing(checkpoint, listed, manifest["world_size"])
    for name, expected in listed.items():
        file = checkpoint / name
        try:
            if not file.is_file():
                found.append(f"{file} is missing")
            elif file.stat().st_size != expected["bytes"]:
                found.append(f"{file} has {file.stat().st_size} bytes, expected {expected['bytes']}")
            elif file_sha256(file) != expected["sha256"]:
                found.append(f"{file} differs from its digest")
        except OSError as error:
            found.append(f"{file} cannot be read ({error.strerror or error})")
    return found


def part_files(checkpoint: Path, kind: str) -> list[Path]:
    """The files of a kind (model, optimizer, random, queue) that the manifest lists, by rank and piece."""
    return [checkpoint / name for name in sorted(_parts(read_manifest(checkpoint)["files"], kind))]


def is_listed(checkpoint: Path, name: str) -> bool:
    """Whether the manifest lists a file."""
    return name in read_manifest(checkpoint)["files"]


def _parts(listed: dict[str, Any], kind: str) -> dict[str, tuple[int, int, int | None]]:
    """(rank, of how many, piece or None) of each listed file of a kind, by name."""
    matches = {name: match for name in listed if (match := _PART.fullmatch(name)) and match["kind"] == kind}
    return {
        name: (int(match["rank"]), int(match["world"]), int(match["piece"]) if match["piece"] else None)
        for name, match in matches.items()
    }


def _not_needed(checkpoint: Path, listed: dict[str, Any]) -> list[str]:
    """Files that are not listed, and listed ones that no checkpoint has. Hidden files are no business of ours."""
    known = {*NEEDED, *OPTIONAL, *(name for kind in PARTED for name in _parts(listed, kind))}
    there = {file.name for file in checkpoint.iterdir() if not file.name.startswith(".")}
    unlisted = sorted(there - {*listed, MANIFEST})
    return [f"{checkpoint / name} is not in {MANIFEST}: remove it" for name in unlisted] + [
        f"{checkpoint / MANIFEST} lists {name}, which is no part of a checkpoint" for name in {*listed} - known
    ]


def _missing(checkpoint: Path, listed: dict[str, Any], world: int) -> list[str]:
    """What a resume needs and the manifest does not list."""
    found = [f"{checkpoint / MANIFEST} does not list {name}" for name in NEEDED if name not in listed]
    for kind in PARTED:
        parts = set(_parts(listed, kind).values())
        worlds = {of for _, of, _ in parts} if kind == "queue" else {world}
        if len(worlds) != 1:
            what = "no" if not worlds else f"{len(worlds)} partitions of"
            found.append(f"{checkpoint / MANIFEST} lists {what} {kind} files, expected one of each rank")
            continue
        (ranks,) = worlds
        for rank in range(ranks):
            pieces = {piece for r, of, piece in parts if (r, of) == (rank, ranks)}
            if pieces != {None} and (not pieces or pieces != set(range(len(pieces)))):
                found.append(f"{checkpoint / MANIFEST} does not list all of {kind} of rank {rank} of {ranks}")
                break
        if any(of != ranks or rank >= ranks for rank, of, _ in parts):
            found.append(f"{checkpoint / MANIFEST} lists {kind} files of more than {ranks} ranks")
    return found
