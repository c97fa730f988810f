"""Command-line flags from typed classes: of a recipe, a section of it, or a verb's own dataclass.

tyro makes the flags and the help. What differs from tyro alone: a section is validated as a recipe's file is, with the
same messages; a mapping is one flag whatever it holds by default (`--loss.args alpha 2 beta 50`, and `--loss.args`
alone empties it); any mistake is one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from configs.explain import explain
from configs.foreign import is_here
from configs.names import nearest
from configs.renamed import RENAMED
from configs.schema import Section
from configs.schema.section import local, with_home

T = TypeVar("T")
Shown = Collection[tuple[type, str]]  # section and field of each key that help shows

REGISTRY = ConstructorRegistry()
SHOWN: ContextVar[Shown | None] = ContextVar("SHOWN", default=None)
EXAMPLE = re.compile(r"rerankvpr [a-z]|.* \| rerankvpr [a-z]")  # how a paragraph begins that is a command
OVER_RECIPES = ("rerankvpr train", "rerankvpr plan")
ELSEWHERE = {"--dry-run": "`rerankvpr plan RECIPE` shows what a training would take"}


class FlagError(ValueError):
    """Flags that cannot be used; the text is one line per mistake."""


def parse_flags(
    kind: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    description: str | None = None,
    shows: Shown | None = None,
) -> T:
    """An instance of a dataclass or a section from flags, over `default` if given. `--help` prints and exits.

    A switch is `--flag` and `--no-flag` (in a section `--section.no-flag`); a list takes any number of values. Keys
    that `shows` does not name are parsed too, but not part of the help. Raises FlagError.
    """
    token = SHOWN.set(shows)
    try:
        parsed: T = _parse(kind, argv, prog=prog, default=default, description=description, rest=False)[0]
    finally:
        SHOWN.reset(token)
    return parsed


def parse_known_flags(
    kind: type[T], argv: Sequence[str], *, prog: str, default: T | None = None
) -> tuple[T, list[str]]:
    """As `parse_flags`, without help: the flags that `kind` knows, and all other words in their order."""
    parsed: tuple[T, list[str]] = _parse(kind, argv, prog=prog, default=default, description=None, rest=True)
    return parsed


def _parse(
    kind: type[Any], argv: Sequence[str], *, prog: str, default: Any, description: str | None, rest: bool
) -> tuple[Any, list[str]]:
    said = io.StringIO()
    cli: Any = tyro.cli
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            parsed = cli(
                kind,
                args=_switches([_in_home(word) for word in argv], kind),
                prog=prog,
                description=_wrapped(description or _about(kind)),
                return_unknown_args=rest,
                add_help=not rest,
                registry=REGISTRY,
                **given,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise FlagError(_one_line(said.getvalue(), prog)) from None
    values, others = parsed if rest else (parsed, [])
    return _validated(values), others


def _about(kind: type[Any]) -> str:
    about = inspect.getdoc(kind) or ""
    return "" if about.startswith(f"{kind.__name__}(") else about  # what a dataclass says of itself without one


def _wrapped(description: str) -> str:
    """Paragraphs in lines of a terminal's width, examples set in further.

    tyro keeps a line's end if the next one starts with a space, and makes two lines of an empty one.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    lines = []
    for paragraph in description.split("\n\n"):
        text = " ".join(paragraph.split())
        first, others = ("      ", "        ") if EXAMPLE.match(text) else ("  ", "  ")
        lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return "\n".join(lines)


def _in_home(word: str) -> str:
    """A word whose path begins with `~/`, which a shell leaves as it is in `--flag=~/x`, in the user's home."""
    flag, equals, value = word.partition("=")
    return f"{flag}={with_home(value)}" if equals and word.startswith("--") else str(with_home(word))


def is_given(argv: Sequence[str], key: str) -> bool:
    """Whether the flag of a key, such as `loss.args`, is among the words."""
    flag = f"--{key.replace('_', '-')}"
    return any(word.partition("=")[0].replace("_", "-") == flag for word in argv)


class _Values(dict[str, Any]):
    """The keys of a section as flags gave them, not validated yet."""

    section: type[Section]


def _validated(value: Any) -> Any:
    if isinstance(value, _Values):
        try:
            return value.section.model_validate(value)
        except ValidationError as error:
            raise FlagError("\n".join(explain(error, value.section))) from error
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _refuse_address(field.name, getattr(value, field.name))
        changed = {
            field.name: _validated(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if isinstance(getattr(value, field.name), _Values)
        }
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _refuse_address(name: str, value: Any) -> None:
    for path in value if isinstance(value, tuple | list) else (value,):
        if isinstance(path, Path):
            try:
                local(path)
            except ValueError as error:
                raise FlagError(f"--{name.replace('_', '-')}: {error}") from None


@REGISTRY.struct_rule
def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A section's keys as flags; its values are validated all together, after the last flag."""
    kind = info.type
    if not _is_section(kind):
        return None

    def instantiate(**values: Any) -> _Values:
        found = _Values(values)
        found.section = kind
        return found

    instantiate.__doc__ = kind.__doc__
    hints = get_type_hints(kind, include_extras=True)
    fields = []
    for name, field in kind.model_fields.items():
        known = getattr(info.default, name, field.get_default(call_default_factory=True))
        text = field.description or getattr(field.annotation, "__doc__", None)
        hint, shown = hints[name], SHOWN.get()
        if shown is not None and (kind, name) not in shown and not _is_section(field.annotation):
            hint = Annotated[hint, tyro.conf.Suppress]
        fields.append(StructFieldSpec(name=name, type=hint, default=known, helptext=text))
    return StructConstructorSpec(instantiate=instantiate, fields=tuple(fields))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


@REGISTRY.primitive_rule
def _mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    if get_origin(info.type) is not dict:
        return None

    def read(words: list[str]) -> dict[str, Any]:
        if len(words) % 2:
            raise ValueError(f"expected pairs of KEY VALUE, got {' '.join(words)}")
        return {key: _scalar(value) for key, value in zip(words[::2], words[1::2], strict=True)}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY VALUE ...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    )


@REGISTRY.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int | float] | None:
    if info.type not in (int, float):
        return None
    kind, what = info.type, "a whole number" if info.type is int else "a number"

    def read(words: list[str]) -> int | float:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {what}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


@REGISTRY.primitive_rule
def _image_size(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """One number, or two: what fits is for the section to say."""
    if get_args(info.type) != get_args(int | tuple[int, int]):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="SIDE | HEIGHT WIDTH",
        instance_from_str=lambda words: words[0] if len(words) == 1 else words,
        is_instance=lambda value: isinstance(value, int | tuple),
        str_from_instance=lambda value: [str(side) for side in (value if isinstance(value, tuple) else [value])],
    )


def _scalar(text: str) -> bool | int | float | str:
    if text in ("True", "False", "true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _switches(argv: Sequence[str], kind: type[Any]) -> list[str]:
    """`--flag True` and `--flag False` as `--flag` and `--no-flag`, for scripts that write them so."""
    names = set(_switch_names(kind))
    out: list[str] = []
    for word in argv:
        before = out[-1] if out else ""
        if word in ("True", "False") and before.removeprefix("--").replace("-", "_") in names:
            if word == "False":
                section, dot, name = before.removeprefix("--").rpartition(".")
                out[-1] = f"--{section}{dot}no-{name}"
        else:
            out.append(word)
    return out


def _switch_names(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of the boolean fields of a dataclass or section."""
    names = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        plain, *notes = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if plain is bool:
            names.append(prefix + name)
        elif isinstance(plain, type) and (issubclass(plain, BaseModel) or dataclasses.is_dataclass(plain)):
            own = any(getattr(note, "name", None) == "" for note in notes)  # its flags have no prefix
            names += _switch_names(plain, prefix if own else f"{prefix}{name}.")
    return names


def _one_line(box: str, prog: str) -> str:
    """What tyro says in a box, as a line: its first paragraph, and the flag it thinks was meant."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    paragraphs = " ".join("\n" if re.fullmatch("[─╭╮╰╯].*", line) else line for line in lines).split("\n")
    texts = [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]
    what = texts[0].removeprefix("Error parsing ") if texts else "these flags cannot be used"
    if wrong := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)\.", what):
        value, flag, known = wrong[1], wrong[2], re.findall(r"'(.*?)'", wrong[3])
        return f"{flag}: {value!r} is not one of {', '.join(known)}; {nearest(value, known)}"
    if not (unknown := re.match(r"Unrecognized options: ([^, ]+)", what)):
        return what
    flag = unknown[1]
    if flag in ELSEWHERE:
        return f"unknown flag {flag}; {ELSEWHERE[flag]}"
    if not flag.startswith("--"):
        return f"{flag!r} belongs to no flag"
    if present := RENAMED.get(flag.removeprefix("--").replace("-", "_")):
        return f"{flag} has another name: write --{present.replace('_', '-')}"
    if prog in OVER_RECIPES and (here := is_here(flag)):
        return f"unknown flag {flag}; here it is {here}"
    meant = next((text for text in texts[1:] if text.startswith("Perhaps you meant:")), "")
    near = re.search(r"--[\w.-]+", meant)
    return f"unknown flag {flag}" + (f"; nearest: {near[0]}" if near else "")
