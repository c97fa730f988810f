"""The plug-ins of a training: what its output and its checkpoints keep of them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from configs.plugins import digests, keep, loaded, note_exported, note_recorded, read_digests
from configs.ranks import same_on_all_ranks
from configs.reading import read_regular, reading
from configs.schema import Recipe
from trainer.manifest import is_listed

FILE = "plugins.json"  # in a checkpoint: digests by name
FOLDER = "plugins"  # in the output folder: copies


def check_same_plugins(recipe: Recipe) -> None:
    """Raises ValueError on every rank if one has run other code than rank 0; every rank must call this."""
    for name, sha256 in digests(recipe.plugins).items():
        same_on_all_ranks(f"plug-in {name}, SHA-256", sha256)


def keep_plugins(recipe: Recipe) -> list[Path]:
    """Copies the recipe's plug-ins to its output folder, each version in a folder of its own; returns the copies."""
    return keep(loaded(recipe.plugins), recipe.output / FOLDER)


def plugins_text(recipe: Recipe) -> str:
    """What a checkpoint records: the digest of each plug-in that the recipe names."""
    return json.dumps(digests(recipe.plugins), indent=1)


def plugins_of(checkpoint: Path) -> dict[str, str]:
    """The digests that a checkpoint records; none of its plug-ins is run. Raises CheckpointError, PluginError."""
    if not is_listed(checkpoint, FILE):
        return {}
    return read_digests(read_regular(checkpoint / FILE), checkpoint / FILE)


def note_checkpoint(checkpoint: Path) -> str:
    """A line on a checkpoint's plug-ins that were not run, or are other ones; else empty. Raises CheckpointError."""
    return note_recorded(plugins_of(checkpoint), checkpoint, checkpoint.parent.parent / FOLDER)


def note_export(file: Path) -> str:
    """The same of an exported network; empty for any other file. Raises ValueError for one that cannot be read."""
    if file.suffix != ".safetensors" or not file.is_file():
        return ""
    with reading(file, "an exported network"), safe_open(file, framework="pt") as content:
        return note_exported(content.metadata() or {}, file)


def plugin_changes(recipe: Recipe, checkpoint: Path) -> dict[str, str]:
    """`old -> new` by plug-in, of those whose code is not the one that wrote the checkpoint."""
    before, here = plugins_of(checkpoint), digests(recipe.plugins)
    names = [name for name in {**before, **here} if before.get(name) != here.get(name)]
    return {f"plug-in {name}": f"{_short(before, name)} -> {_short(here, name)}" for name in names}


def _short(of: dict[str, str], name: str) -> str:
    return of.get(name, "none")[:8]
