"""What is wrong with the values of a recipe, in lines that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.names import nearest
from configs.reading import shown
from configs.renamed import RENAMED
from configs.schema import Recipe


def explain(error: ValidationError, root: type[BaseModel] = Recipe) -> list[str]:
    """One line per fault: the key as section.key, what is wrong, the nearest valid key or value.

    `root` is what was validated: a recipe, or one of its sections.
    """
    return [_explain_one(dict(fault), root) for fault in error.errors()]


@contextmanager
def explained(root: type[BaseModel] = BaseModel) -> Iterator[None]:
    """Raises ValueError with the first fault that pydantic found in the block, as `explain` says it."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(explain(error, root)[0]) from error


def _explain_one(fault: dict[str, Any], root: type[BaseModel]) -> str:
    loc = [shown(part) for part in fault["loc"]]
    key, given = ".".join(loc), shown(repr(fault["input"]))
    if fault["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"{key} has another name: write {RENAMED[key]}"
        names = list(_section(root, loc[:-1]).model_fields)
        return f"unknown key {key}; {nearest(loc[-1], names, prefix=''.join(f'{p}.' for p in loc[:-1]))}"
    if fault["type"] == "literal_error":
        quoted = re.findall(r"'[^']*'|\d+", fault["ctx"]["expected"])  # of a key, or of a list's items
        choices = [choice.strip("'") for choice in quoted]
        return f"{key}: {given} is not one of {', '.join(choices)}; {nearest(shown(fault['input']), choices)}"
    message = shown(fault["msg"].removeprefix("Value error, "))
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {given}"


def _section(root: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    section = root
    for part in loc:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return section
