"""What an index says of itself: `index.json`, replaced as a whole each time that the index has grown."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from configs.explain import explained
from configs.files import write_whole
from configs.plugins import note_recorded
from configs.reading import reading, shown
from configs.schema import ANY_NAME, EvalConfig, ModelConfig

FORMAT = 1
FILE = "index.json"
PART = "part.json"
NETWORK = "network.safetensors"
PLUGINS = "plugins"  # folder of copies of the plug-ins that the network is made of
ENCODED_BY = {"image_size", "resize", "interpolation", "batch_size", "precision", "rerank"}
APPROXIMATE = {"factory", "params", "sha256"}
DIGEST = "sha256"  # of all else that a description holds
MOST_IMAGES = 10**12
_AS_WRITTEN = ConfigDict(extra="forbid", strict=True)

Precision = Literal["fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=0, le=MOST_IMAGES)]


class IndexFault(ValueError):
    """An index that is absent, damaged, of another kind or of other weights; one line naming file and remedy."""


@dataclass(frozen=True)
class Manifest:
    """The parts of an index, in the order of their images, and what all of them were made with."""

    images: Count
    parts: list[Annotated[str, Field(pattern="^[0-9]{6}$")]]  # folders under parts/
    weights: str  # digest of the network's weights
    network: dict[str, Any]  # the section `model` of its recipe
    precision: Precision  # of its weights
    settings: dict[str, Any]  # of `eval`: those of ENCODED_BY
    approximate: dict[str, str] | None = None  # factory and params of its FAISS index, digest of the trained file
    verdict: dict[str, Any] | None = None  # what `Verdict` was learned
    plugins: dict[str, str] = field(default_factory=dict)  # SHA-256 of each that the network is made of, by name
    format: int = FORMAT
    __pydantic_config__ = _AS_WRITTEN

    def config(self) -> EvalConfig:
        """The settings that photographs are encoded and re-ranked by."""
        return EvalConfig.model_validate(self.settings)

    def model(self) -> ModelConfig:
        """The section `model` of the network's recipe, whose names a plug-in may have to make known."""
        return ModelConfig.model_validate(self.network, context=ANY_NAME)


@dataclass(frozen=True)
class Part:
    """Photographs that were encoded together: `counts` of each feature shard, their root, what was left out and why."""

    images: Count
    counts: list[Count]
    root: str
    in_metres: bool
    # name, reason
    left_out: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)  # SHA-256 of each block of the FAISS index
    __pydantic_config__ = _AS_WRITTEN


_MANIFEST, _PART = TypeAdapter(Manifest), TypeAdapter(Part)


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
        text = file.read_text(encoding="utf-8")
        written = dict(json.loads(text).items()).get("format")
        if type(written) is int and written > FORMAT:
            raise IndexFault(f"{file}: an index of format {written}, this rerankvpr reads {FORMAT}; use a newer one")
        with explained():
            manifest = _MANIFEST.validate_json(_whole(text))
        if written != FORMAT:
            raise ValueError(f"format {shown(written)}")
        if manifest.approximate is not None and manifest.approximate.keys() != APPROXIMATE:
            raise ValueError(f"approximate of {shown(sorted(manifest.approximate))}")
        if (learned := manifest.verdict) is not None:
            threshold, sample, apart = (learned[name] for name in ("threshold", "sample", "apart"))
            if not (math.isfinite(threshold) and type(sample) is int and isinstance(apart, str)):
                raise ValueError(f"verdict {shown(learned)}")
        with explained(EvalConfig):
            manifest.config()
        with explained(ModelConfig):
            manifest.model()
    return manifest


def model_of(folder: Path, manifest: Manifest) -> ModelConfig:
    """The section `model` of an index's recipe. Raises IndexFault where it has a name that is not known here."""
    with reading(folder / FILE, "the description of an index", IndexFault), explained(ModelConfig):
        return ModelConfig.model_validate(manifest.network)


def check_plugins(folder: Path, manifest: Manifest) -> None:
    """Raises IndexFault if plug-ins that the network is made of were not run here, or are other ones."""
    if said := note_recorded(manifest.plugins, folder, folder / PLUGINS):
        remedy = "" if "was not run" in said else f"; {folder / PLUGINS} holds the one to run with --plugins"
        raise IndexFault(said + remedy)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes what is in the folder the index that readers see."""
    write_whole(folder / FILE, _with_digest(asdict(manifest), indent=1), durable=True)


def part_folder(folder: Path, name: str) -> Path:
    """Where the features and the table of a part are."""
    return folder / "parts" / name


def read_part(folder: Path, name: str) -> Part:
    """What a part says of itself. Raises IndexFault naming the file."""
    file = part_folder(folder, name) / PART
    with reading(file, "the description of a part of an index", IndexFault):
        with explained():
            part = _PART.validate_json(_whole(file.read_text(encoding="utf-8")))
        if sum(part.counts) != part.images:
            raise ValueError(f"{part.images} images, {sum(part.counts)} in its shards")
    return part


def write_part(folder: Path, name: str, part: Part) -> None:
    """Says that a part is whole."""
    write_whole(part_folder(folder, name) / PART, _with_digest(asdict(part)), durable=True)


def _with_digest(content: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps({**content, DIGEST: _digest(content)}, indent=indent) + "\n"


def _whole(text: str) -> str:
    """A description without its digest, which one written before there were any does not have."""
    content = dict(json.loads(text).items())
    if (said := content.pop(DIGEST, None)) is not None and said != _digest(content):
        raise ValueError(f"its {DIGEST} is that of other values: damaged, or edited by hand without removing that line")
    return json.dumps(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
