"""Reading a recipe from YAML, with errors that name the key and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.explain import explain
from configs.plugins import load_plugins
from configs.reading import reading, shown
from configs.registry import AGGREGATORS, BACKBONES
from configs.renamed import with_present_names
from configs.schema import ANY_NAME, Recipe, with_home
from configs.secrets import without_secrets

RECIPES = Path(__file__).resolve().parent
MOST_BYTES, MOST_VALUES, MOST_BRACKETS, DEEPEST = 1 << 20, 10_000, 1000, 20


class RecipeError(ValueError):
    """A recipe that cannot be run; the text is one line a fault."""


def load_recipe(path: Path, *, plugins: Sequence[str] | None = None, run: bool = True) -> Recipe:
    """The recipe in a YAML file, its plug-ins run; a bare name such as `demo` means the recipe shipped under that name.

    `plugins` take the place of the recipe's own. Without `run`, for help, no plug-in is run and any name passes.
    Raises RecipeError naming file, key and the nearest valid one; a renamed key gets its present name. Raises
    PluginError.
    """
    file = find_recipe(path)
    content = _read(file)
    if plugins is not None:
        content["plugins"] = list(plugins)
    if not run:
        return _validated(content, file, ANY_NAME)
    named = content.get("plugins")
    if isinstance(named, list) and all(isinstance(one, str) for one in named):
        load_plugins(with_home(named))
    return _validated(content, file)


def load_stored_recipe(file: Path) -> Recipe:
    """The recipe that a training kept in its output folder or in a checkpoint, whatever its keys were called then.

    Its plug-ins are not run, and so it may name what nothing here stands for. Raises RecipeError, FileNotFoundError.
    """
    return _validated(with_present_names(_read(file)), file, ANY_NAME)


def stored_recipe(text: str, name: str | Path) -> Recipe:
    """The recipe in the text that an exported file holds, whatever its keys were called then; errors name `name`.

    Its plug-ins are not run (see `load_stored_recipe`). Raises RecipeError.
    """
    return _validated(with_present_names(_parsed(text, name)), name, ANY_NAME)


def check_network(recipe: Recipe, file: str | Path) -> None:
    """Raises RecipeError, naming the `file` of a stored recipe, if its network has a name that is not known here."""
    try:
        BACKBONES.check(recipe.model.backbone)
        AGGREGATORS.check(recipe.model.aggregator)
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    with reading(file, "a recipe in YAML", RecipeError):
        if file.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{file}: {file.stat().st_size} bytes are no recipe; expected at most {MOST_BYTES}")
        text = file.read_text(encoding="utf-8")
    return _parsed(text, file)


def _parsed(text: str, file: str | Path) -> dict[str, Any]:
    with reading(file, "a recipe in YAML", RecipeError):
        if len(text) > MOST_BYTES:
            raise RecipeError(f"{file}: {len(text)} characters are no recipe; expected at most {MOST_BYTES}")
        if text.count("[") + text.count("{") > MOST_BRACKETS:  # nested, they cost the parser their square
            raise RecipeError(f"{file}: more than {MOST_BRACKETS} brackets: no recipe")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{file}: not valid YAML ({shown(' '.join(str(error).split()))})") from error
        _check_extent(content, file)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"{file}: expected a mapping of sections such as `data:` and `model:`")
    return content


def _check_extent(content: Any, file: str | Path) -> None:
    """Raises RecipeError for a document of more values than any recipe has: aliases of aliases grow without bound."""
    waiting, values = [(content, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        values += 1
        if values > MOST_VALUES or depth > DEEPEST:
            raise RecipeError(
                f"{file}: more than {MOST_VALUES} values, or deeper than {DEEPEST}; no recipe is so large"
            )
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list | set | tuple) else ()
        waiting += [(value, depth + 1) for value in inner]


def _validated(content: dict[str, Any], file: str | Path, context: dict[str, Any] | None = None) -> Recipe:
    try:
        return Recipe.model_validate(content, context=context)
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


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out; without the secrets of its addresses, for it goes with the results."""
    return yaml.safe_dump(shareable(recipe.model_dump(mode="json")), sort_keys=False)


def shareable(value: Any) -> Any:
    """A value of a recipe, or of a part of one, without the secrets of its addresses."""
    if isinstance(value, dict):
        return {shareable(key): shareable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shareable(part) for part in value]
    return without_secrets(value, is_address=True, remembered=False) if isinstance(value, str) else value
