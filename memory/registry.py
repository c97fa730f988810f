"""From a name and arguments of a recipe to a loss or a miner."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def build(kind: str, name: str, arguments: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]) -> Any:
    """`known[name](**arguments)`. Raises ValueError that names the key and what would be right."""
    if name not in known:
        names = f"known: {', '.join(known)}" if len(known) <= 12 else f"{len(known)} are known, see docs/memory.md"
        raise ValueError(f"{kind} {name!r} is not known{_nearest(name, list(known))}; {names}")
    accepted = list(inspect.signature(known[name]).parameters)
    for argument in arguments:
        if argument not in accepted:
            raise ValueError(
                f"{name} takes no argument {argument!r}{_nearest(argument, accepted)}; it takes "
                f"{', '.join(accepted) or 'none'}"
            )
    try:
        return known[name](**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name}: {error}") from error


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
