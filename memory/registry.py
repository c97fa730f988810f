"""From a name and arguments of a recipe to a loss or a miner."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from configs.names import nearest


def build(kind: str, name: str, arguments: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]) -> Any:
    """`known[name](**arguments)`. Raises ValueError that names the key and what would be right."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, known)} (docs/memory.md lists all)")
    accepted = list(inspect.signature(known[name]).parameters)
    for argument in arguments:
        if argument not in accepted:
            raise ValueError(
                f"{name} takes no argument {argument!r}; {nearest(argument, accepted)} (it takes "
                f"{', '.join(accepted) or 'none'})"
            )
    try:
        return known[name](**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name}: {error}") from error
