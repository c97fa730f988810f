"""What an index says of itself: `index.json`, replaced as a whole each time that the index has grown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.files import write_whole
from configs.plugins import note_recorded
from configs.reading import reading, shown
from configs.schema import EvalConfig

FORMAT = 1
FILE = "index.json"
PART = "part.json"
NETWORK = "network.safetensors"
PLUGINS = "plugins"  # folder of copies of the plug-ins that the network is made of
ENCODED_BY = {"image_size", "resize", "interpolation", "batch_size", "precision", "rerank"}


class IndexFault(ValueError):
    """An index that is absent, damaged, of another kind or of other weights; one line naming file and remedy."""


@dataclass(frozen=True)
class Manifest:
    """The parts of an index, in the order of their images, and what all of them were made with."""

    images: int
    parts: list[str]  # folders under parts/
    weights: str  # digest of the network's weights
    network: dict[str, Any]  # the section `model` of its recipe
    precision: str  # of its weights
    settings: dict[str, Any]  # of `eval`: those of ENCODED_BY
    approximate: dict[str, str] | None = None  # factory and params of its FAISS index, digest of the trained file
    verdict: dict[str, Any] | None = None  # what `Verdict` was learned
    plugins: dict[str, str] = field(default_factory=dict)  # SHA-256 of each that the network is made of, by name
    format: int = FORMAT

    def config(self) -> EvalConfig:
        """The settings that photographs are encoded and re-ranked by."""
        return EvalConfig.model_validate(self.settings)


@dataclass(frozen=True)
class Part:
    """Photographs that were encoded together: `counts` of each feature shard, their root, what was left out and why."""

    images: int
    counts: list[int]
    root: str
    in_metres: bool
    left_out: list[list[str]] = field(default_factory=list)  # name, reason
    notes: list[str] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)  # SHA-256 of each block of the FAISS index


def settings_of(config: EvalConfig) -> dict[str, Any]:
    """Of the settings of `eval`, what an index is made with."""
    return config.model_dump(mode="json", include=ENCODED_BY)


def exists(folder: Path) -> bool:
    """Whether a folder holds an index that can be opened."""
    return (folder / FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """What an index says of itself. Raises IndexFault naming the folder or the file."""
    file = folder / FILE
    if not file.is_file():
        if (folder / "parts").is_dir():
            raise IndexFault(f"{folder}: an index that is not finished; run the same `rerankvpr index build` again")
        what = "no index in it" if folder.is_dir() else "no such folder"
        raise IndexFault(f"{folder}: {what}; `rerankvpr index build DB --checkpoint C --out {folder}` makes one")
    with reading(file, "the description of an index", IndexFault):
        content = dict(json.loads(file.read_text(encoding="utf-8")).items())
        written = content.get("format")
        if type(written) is int and written > FORMAT:
            raise IndexFault(f"{file}: an index of format {written}, this rerankvpr reads {FORMAT}; use a newer one")
        manifest = Manifest(**content)
        if written != FORMAT or type(manifest.images) is not int or manifest.images < 0:
            raise ValueError(f"format {shown(written)}, {shown(manifest.images)} images")
        if not all(isinstance(name, str) and len(name) == 6 and name.isdecimal() for name in manifest.parts):
            raise ValueError("a part that is no number of six digits")
        if not all(isinstance(sha256, str) for sha256 in dict(manifest.plugins).values()):
            raise ValueError("plug-ins without their digests")
        manifest.config()
    return manifest


def check_plugins(folder: Path, manifest: Manifest) -> None:
    """Raises IndexFault if plug-ins that the network is made of were not run here, or are other ones."""
    if said := note_recorded(manifest.plugins, folder, folder / PLUGINS):
        remedy = "" if "was not run" in said else f"; {folder / PLUGINS} holds the one to run with --plugins"
        raise IndexFault(said + remedy)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes what is in the folder the index that readers see."""
    write_whole(folder / FILE, json.dumps(asdict(manifest), indent=1) + "\n", durable=True)


def part_folder(folder: Path, name: str) -> Path:
    """Where the features and the table of a part are."""
    return folder / "parts" / name


def read_part(folder: Path, name: str) -> Part:
    """What a part says of itself. Raises IndexFault naming the file."""
    file = part_folder(folder, name) / PART
    with reading(file, "the description of a part of an index", IndexFault):
        part = Part(**json.loads(file.read_text(encoding="utf-8")))
        if sum(part.counts) != part.images:
            raise ValueError(f"{part.images} images, {sum(part.counts)} in its shards")
    return part


def write_part(folder: Path, name: str, part: Part) -> None:
    """Says that a part is whole."""
    write_whole(part_folder(folder, name) / PART, json.dumps(asdict(part)) + "\n", durable=True)
