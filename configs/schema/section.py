"""What every section of a recipe is made of."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from configs.registry import Registry
from configs.secrets import without_secrets

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters and more: C:/ is a disk

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegative = Annotated[int, Field(ge=0)]

ANY_NAME = {"any_name": True}  # pydantic's context where names of plug-ins that were not run must pass


def registered(registry: Registry[Any]) -> AfterValidator:
    """What makes a text a name of `registry`, in Annotated[str, ...]; under the context `ANY_NAME` any name passes.

    Its message is that of a literal type, with the nearest name.
    """

    def check(name: str, info: ValidationInfo) -> str:
        if name not in registry and not (info.context or {}).get("any_name"):
            raise ValueError(f"{name!r} is not one of {', '.join(registry)}; {registry.nearest(name)}")
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: Any) -> Any:
        return with_home(value)


def with_home(value: Any) -> Any:
    """A value whose paths that start with `~` start with the home folder instead, also within lists and mappings.

    `folder:~/x`, `manifest:~/x` and `layout:NAME:~/x` name paths too, and other texts that start with `~/` mean nothing
    else.
    """
    if isinstance(value, Path):
        return Path(_expanded(str(local(value))))
    if isinstance(value, str):
        kind, colon, rest = value.partition(":")
        if kind in ("folder", "manifest") and colon:
            return f"{kind}:{_expanded(rest)}"
        if kind == "layout" and ":" in rest:
            layout, _, path = rest.partition(":")
            return f"layout:{layout}:{_expanded(path)}"
        return _expanded(value)
    if isinstance(value, list):
        return [with_home(part) for part in value]
    if isinstance(value, dict):
        return {with_home(key): part for key, part in value.items()}
    return value


def local(path: Path) -> Path:
    """The path itself. Raises ValueError for an address, of which a path makes folders named `http:` and so on.

    A folder of that name that exists is one.
    """
    if _ADDRESS.match(str(path)) and not Path(path.parts[0]).exists():
        address = without_secrets(str(path).replace(":/", "://", 1), is_address=True)
        raise ValueError(f"{address} is an address; expected a path of this machine")
    return path


def _expanded(text: str) -> str:
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text  # noqa: PTH111 - keeps `//`
