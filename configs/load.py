"""Reading a recipe from YAML, with errors that name the key and what would be right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.names import nearest
from configs.schema import Recipe

RECIPES = Path(__file__).resolve().parent


class RecipeError(ValueError):
    """A recipe that cannot be run; the text is one line a fault."""


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file; a bare name such as `demo` means the recipe shipped under that name.

    Raises RecipeError naming file, key and the nearest valid one.
    """
    file = find_recipe(path)
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: expected a mapping of sections such as `data:` and `model:`")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{file}: {line}" for line in explain(error))) from error


def find_recipe(path: Path) -> Path:
    """The file that `path` means: itself, or a shipped recipe."""
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    raise RecipeError(f"recipe {path} does not exist; give a YAML file or one of: {', '.join(shipped)}")


def explain(error: ValidationError) -> list[str]:
    """One line a fault: the key as section.key, what is wrong, the nearest valid key or value."""
    return [_explain_one(dict(fault)) for fault in error.errors()]


def _explain_one(fault: dict[str, Any]) -> str:
    loc = [str(part) for part in fault["loc"]]
    key = ".".join(loc)
    if fault["type"] == "extra_forbidden":
        names = list(_section(loc[:-1]).model_fields)
        return f"unknown key {key}; {nearest(loc[-1], names, prefix=''.join(f'{p}.' for p in loc[:-1]))}"
    if fault["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(_section(loc[:-1]).model_fields[loc[-1]].annotation)]
        return f"{key}: {fault['input']!r} is not one of {', '.join(choices)}; {nearest(str(fault['input']), choices)}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {fault['input']!r}"


def _section(loc: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in loc:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return section


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out; without the secrets of its addresses, for it goes with the results."""
    return yaml.safe_dump(_shareable(recipe.model_dump(mode="json")), sort_keys=False)


def _shareable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_shareable(key): _shareable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shareable(part) for part in value]
    return without_secrets(value) if isinstance(value, str) else value


def without_secrets(text: str) -> str:
    """A text whose addresses have lost user name, password and query: `http://ann:pw@host/x?key=1` is `http://host/x`."""
    return re.sub(r"(\w://)(?:[^\s/'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)
