"""What `make docs` puts into the pages where they ask for it: recipe keys, benchmarks, commands, drawings, notebooks.

A page asks by a line of its own, `<!-- keys -->` or `<!-- include CONTRIBUTING.md -->`. So these parts are those of the
code that the site is built from, and no file has to be written again when the code changes.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MARK = re.compile(r"^<!-- ([a-z]+)(?: (\S+))? -->$", re.MULTILINE)
MERMAID = re.compile(r"^```mermaid\n.*?^```$", re.MULTILINE | re.DOTALL)  # GitHub draws it, the site has `rooms`
ROOMS = ("launch", "trainer", "eval", "memory", "model", "data_pipeline", "configs")
REPOSITORY_FILES = re.compile(r"\]\((?:\.\./)+(SECURITY|CONTRIBUTING|CHANGELOG|README)\.md(#[^)]*)?\)")
PAGES = {
    "SECURITY": "security.md",
    "CONTRIBUTING": "contributing.md",
    "CHANGELOG": "changelog.md",
    "README": "index.md",
}
COLUMNS = "80"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs' event: a page's text with the parts that it asks for, and links to files of the repository as pages."""
    depth = page.file.src_uri.count("/")
    markdown = MERMAID.sub(lambda _: rooms(), markdown)
    return REPOSITORY_FILES.sub(lambda link: f"]({'../' * depth}{PAGES[link[1]]}.md{link[2] or ''})", filled(markdown))


def filled(markdown: str) -> str:
    """A page's text with each mark replaced by what it names. Raises KeyError for a mark that is unknown."""
    return MARK.sub(lambda mark: PARTS[mark[1]](mark[2] or ""), markdown)


def keys(_: str = "") -> str:
    """Every key of a recipe, a table for each section, from the schema."""
    from configs.schema import Recipe

    return "\n\n".join(_section_tables(Recipe, ""))


def _section_tables(section: Any, prefix: str) -> Iterator[str]:
    rows, inner = [], []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if hasattr(kind, "model_fields"):
            inner.append((kind, f"{prefix}{name}."))
            continue
        default = field.get_default(call_default_factory=True)
        if (prefix, name) == ("tracking.", "uri"):
            default = "sqlite:///mlflow.db"  # whatever MLFLOW_TRACKING_URI is here
        cells = (f"`{prefix}{name}`", f"`{_shown(default)}`", _values(kind, field.metadata), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = f"## `{prefix.rstrip('.')}`" if prefix else "## The recipe itself"
    about = (section.__doc__ or "").strip().splitlines()[0]
    yield "\n".join([title, "", about, "", "| key | default | values | what |", "| --- | --- | --- | --- |", *rows])
    for kind, deeper in inner:
        yield from _section_tables(kind, deeper)


def _shown(value: object) -> str:
    return "none" if value is None else str(value) if str(value) else '""'


def _values(kind: Any, metadata: list[Any]) -> str:
    """The values that a key takes, in words: its names, or its type and bounds."""
    said: list[str] = []
    names: list[str] = []
    parts = get_args(kind) if get_origin(kind) is not Literal and type(None) in get_args(kind) else (kind,)
    for part in parts:
        if get_origin(part) is Literal:
            names += [f"`{value}`" for value in get_args(part)]
        elif part is type(None):
            names.append("none")
        elif get_args(part) and hasattr(part, "__metadata__"):
            said.append(_values(get_args(part)[0], list(part.__metadata__)))
        else:
            said.append(_type(part))
    bounds = []
    for note in metadata:
        for inner in getattr(note, "metadata", [note]):
            for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
                if (bound := getattr(inner, name, None)) is not None:
                    bounds.append(f"{sign} {bound}")
    return ", ".join([*[" ".join([text, *dict.fromkeys(sorted(bounds, reverse=True))]) for text in said], *names])


def _type(kind: Any) -> str:
    plain = {bool: "True, False", int: "whole number", float: "number", str: "text", Path: "path"}
    if kind in plain:
        return plain[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list:
        return f"list of {_values(inner[0], [])}"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"{len(inner)} numbers"
    if inner and hasattr(kind, "__metadata__"):
        return _values(inner[0], list(kind.__metadata__))
    if inner:
        return " or ".join(dict.fromkeys(_values(part, []) for part in inner))
    return str(getattr(kind, "__name__", kind))


def recipes(_: str = "") -> str:
    """The shipped recipes with the comments that they begin with."""
    rows = ["| recipe | what |", "| --- | --- |"]
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        about = re.match(r"(?:#.*\n)*", file.read_text())
        lines = about[0].splitlines() if about else []
        rows.append(f"| `{file.stem}` | {' '.join(line.removeprefix('#').strip() for line in lines)} |")
    return "\n".join(rows)


def benchmarks(_: str = "") -> str:
    """The catalogue of benchmarks: where to get each, its layouts, its size, its faults."""
    from eval.benchmarks.catalogue import CATALOGUE

    rows = [
        "| benchmark | images, queries | what, where to get it, and the layouts that are read |",
        "| --- " * 3 + "|",
    ]
    for name, entry in CATALOGUE.items():
        sizes, layouts = [], []
        for key, variant in entry.variants.items():
            counts = "{:,}, {:,}".format(*variant.counts) if variant.counts else "any"
            sizes.append(f"{key}: {counts}" if key else counts)
            layouts += [f"`{layout.expects}`" for layout in variant.layouts]
        sizes, layouts = list(dict.fromkeys(sizes)), list(dict.fromkeys(layouts))
        lines = [f"{entry.what}. Get it: {_linked(entry.source)}."]
        lines += [f"**Mind:** {entry.fault}."] if entry.fault else []
        lines += ["Reads " + ", or ".join(layouts[:5]) + (", ..." if len(layouts) > 5 else ".")]
        rows.append(f"| `{name}` | {'<br>'.join(sizes[:6])} | {'<br>'.join(lines)} |")
    return "\n".join(rows)


def _linked(text: str) -> str:
    """Addresses without `https://`, as the catalogue has them, as links."""
    return re.sub(r"(?<![\w/.])((?:[a-z0-9-]+\.)+[a-z]{2,4}/[\w./~-]+)", r"[\1](https://\1)", text)


def commands(_: str = "") -> str:
    """The help of every verb, as a terminal shows it."""
    from launch.cli import VERBS, function_of

    parts = []
    for name, verb in VERBS.items():
        said = _help_of(function_of(name), name)
        usage = f"`rerankvpr {name} {verb.arguments}`".replace(" `", "`")
        parts += [f"## {name}", usage, verb.text, f"```text\n{said}\n```"]
    return "\n\n".join(parts)


def _help_of(main: Callable[[list[str]], int], verb: str) -> str:
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main(["demo", "--help"] if verb in ("train", "plan") else ["--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip()


def rooms(_: str = "") -> str:
    """A drawing of the packages and of who imports whom, read from the imports of the code."""
    imports = {room: _imports(room) for room in ROOMS}
    level: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in level:
            level[room] = 1 + max((height(other) for other in imports[room]), default=-1)
        return level[room]

    for room in ROOMS:
        height(room)
    top, wide, tall, row = max(level.values()), 150, 46, 84
    at: dict[str, tuple[float, float]] = {}
    for number in range(top + 1):
        here = [room for room in ROOMS if level[room] == number]
        for place, room in enumerate(here):
            at[room] = (350 + (place - (len(here) - 1) / 2) * 210, 10 + (top - number) * row)
    parts = [
        f'<svg class="drawing" viewBox="0 0 700 {tall + 20 + top * row}" role="img" aria-label="Packages and their '
        'imports" fill="none" stroke="currentColor" font-size="13" text-anchor="middle">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8Z" fill="currentColor" stroke="none"/></marker></defs>',
    ]
    for room, others in imports.items():
        below = {further for other in others for further in imports[other]}
        for other in sorted(others - below):  # what another arrow implies is not drawn
            (x, y), (to_x, to_y) = at[room], at[other]
            parts.append(f'<path d="M{x:.0f} {y + tall:.0f} L{to_x:.0f} {to_y - 2:.0f}" marker-end="url(#to)"/>')
    for room, (x, y) in at.items():
        files = list((ROOT / room).glob("**/*.py"))
        parts.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y:.0f}" width="{wide}" height="{tall}" rx="6" fill="#009688" '
            f'fill-opacity="0.18"/><text x="{x:.0f}" y="{y + 20:.0f}" fill="currentColor" stroke="none" '
            f'font-weight="bold">{room}</text><text x="{x:.0f}" y="{y + 37:.0f}" fill="currentColor" stroke="none" '
            f'font-size="11">{len(files)} modules</text>'
        )
    return "".join([*parts, "</svg>"])


def _imports(room: str) -> set[str]:
    """The other packages of ours that a package imports, at the top of its files or inside functions."""
    found: set[str] = set()
    for file in (ROOT / room).glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found & set(ROOMS) - {room}


def include(name: str) -> str:
    """A file of the repository without its title; its links to docs/ are links to pages."""
    text = (ROOT / name).read_text().split("\n", 1)[1]
    return text.replace("](docs/", "](").replace("](SECURITY.md)", "](security.md)")


def notebook(name: str) -> str:
    """A notebook's cells without its title: texts, code, what was printed, pictures."""
    parts = [f"[Download this notebook]({name})"]
    for number, cell in enumerate(json.loads((DOCS / "notebooks" / name).read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.split("\n", 1)[1].strip() if number == 0 and "\n" in source else source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]).rstrip() + "\n```")
            for kind, data in output.get("data", {}).items():
                parts.append(
                    f'<div class="outputs"><img alt="what the cell draws" src="data:{kind};base64,{data}"></div>'
                )
    return "\n\n".join(parts)


PARTS: dict[str, Callable[[str], str]] = {
    "benchmarks": benchmarks,
    "commands": commands,
    "include": include,
    "keys": keys,
    "notebook": notebook,
    "recipes": recipes,
    "rooms": rooms,
}
