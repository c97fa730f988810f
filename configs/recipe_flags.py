"""A recipe with flags over it: what `train`, `plan` and others take after their verb."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from configs.flags import FlagError, is_given, parse_flags, parse_known_flags
from configs.load import RECIPES, load_recipe
from configs.schema import Recipe, Section

HELP, HELP_ALL = {"-h", "--help"}, "--help-all"
SET_OFTEN = (
    "output",
    "data.shards",
    "data.places_per_batch",
    "data.image_size",
    "model.backbone",
    "model.weights",
    "memory.size",
    "optim.lr",
    "trainer.epochs",
    "eval.benchmarks",
)


@dataclass(frozen=True)
class RecipeCommand:
    """Base of a verb whose first word is a recipe, and whose flags are the recipe's keys and some of its own."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A YAML file, or the name of a shipped recipe."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """What the file says, with the flags over it."""


Command = TypeVar("Command", bound=RecipeCommand)


def parse_over_recipe(kind: type[Command], argv: Sequence[str], *, verb: str) -> tuple[Command, list[str]]:
    """The verb's command, flags applied over the recipe that the first word names, and what was left out of it.

    `--help` shows `SET_OFTEN` and the verb's own flags, `--help-all` every key.

    A mapping that a flag gives replaces the recipe's; another loss, miner or aggregator drops the arguments of the
    recipe's own.
    Raises FlagError or RecipeError.
    """
    prog = f"rerankvpr {verb}"
    shipped = f"Shipped recipes: {', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}."
    about = inspect.cleandoc(kind.__doc__ or "")
    shows = None
    if HELP_ALL in argv:
        argv = ["--help" if word == HELP_ALL else word for word in argv]
        which = "Every key of a recipe is a flag; the values below are the recipe's."
    else:
        named = argv[0] if argv and not argv[0].startswith("-") else "RECIPE"
        which = f"Below are the keys that people set, with the recipe's values; for all:\n\n{prog} {named} {HELP_ALL}"
        shows = _fields(SET_OFTEN) if HELP & set(argv) else None
    description = f"{about}\n\n{which}\n\n{shipped}"
    if not argv or argv[0].startswith("-"):
        if HELP & set(argv):
            parse_flags(kind, ["--help"], prog=prog, description=description, shows=shows)
        raise FlagError(f"{verb} needs a recipe first: {prog} RECIPE [--section.key value]. {shipped.rstrip('.')}")
    plugins = named_plugins(argv, prog=prog)
    read = load_recipe(Path(argv[0]), plugins=plugins, run=not HELP & set(argv))
    default = kind(file=Path(argv[0]), recipe=read)
    command = parse_flags(kind, argv, prog=prog, default=default, description=description, shows=shows)
    recipe, notes = _without_foreign_arguments(command.recipe, read, argv)
    return dataclasses.replace(command, recipe=recipe), notes


@dataclass(frozen=True)
class _Plugins:
    plugins: tuple[str, ...] = ()


def named_plugins(argv: Sequence[str], *, prog: str) -> list[str] | None:
    """What `--plugins` names among a verb's words, None without it: they must run before the other flags are read."""
    if not is_given(argv, "plugins"):
        return None
    return list(parse_known_flags(_Plugins, argv, prog=prog)[0].plugins)


def _without_foreign_arguments(recipe: Recipe, read: Recipe, argv: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`recipe` without arguments that are for another loss, miner or aggregator of `read`, and a line on each."""
    changed: dict[str, Section] = {}
    notes = []
    for section, name, mapping in (
        ("loss", "name", "args"),
        ("loss", "miner", "miner_args"),
        ("model", "aggregator", "aggregator_args"),
    ):
        old, new = getattr(read, section), changed.get(section, getattr(recipe, section))
        before, now, kept = getattr(old, name), getattr(new, name), getattr(new, mapping)
        if now != before and kept and not is_given(argv, f"{section}.{mapping}"):
            changed[section] = new.model_copy(update={mapping: {}})
            said = ", ".join(f"{key} {value}" for key, value in kept.items())
            notes.append(f"{section}.{mapping} of the recipe ({said}) are for {before}; {now} is used without them")
    return recipe.model_copy(update=changed), notes


def _fields(keys: Sequence[str]) -> set[tuple[type, str]]:
    """Section and field of each key of a recipe."""
    found = set()
    for key in keys:
        section: Any = Recipe
        *path, name = key.split(".")
        for part in path:
            section = section.model_fields[part].annotation
        found.add((section, name))
    return found
