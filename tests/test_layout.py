"""Imports point down only, and every room is guessable."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
ENTRY = ROOT / "rerankvpr.py"

BELOW = {
    "configs": set(),
    "data_pipeline": {"configs"},
    "model": {"configs"},
    "memory": {"configs"},
    "eval": {"data_pipeline", "model", "configs"},
    "trainer": {"eval", "memory", "model", "data_pipeline", "configs"},
    "launch": {"trainer", "eval", "memory", "model", "data_pipeline", "configs"},
}


@cache
def imports(file: Path) -> list[ast.Import | ast.ImportFrom]:
    """What a file imports, at its top or inside a function."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_rooms(file: Path) -> set[str]:
    names = set()
    for node in imports(file):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_down(room: str) -> None:
    files = sorted((ROOT / room).glob("**/*.py"))
    assert files
    for file in files:
        assert imported_rooms(file) <= BELOW[room] | {room}, f"{file.relative_to(ROOT)} imports upwards"


def imported_modules(file: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports."""
    names = set()
    for node in imports(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & known


def modules() -> dict[str, Path]:
    """The files of ours by the name that each is imported by, the entry included."""
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (ENTRY, *(file for room in BELOW for file in (ROOT / room).glob("**/*.py")))
    }


def test_no_files_import_each_other_in_a_circle() -> None:
    files = modules()
    below = {name: imported_modules(file, set(files)) - {name} for name, file in files.items()}
    done: set[str] = set()
    while leaves := [name for name in below if name not in done and below[name] <= done]:
        done.update(leaves)
    assert not set(files) - done, "in a circle, or above one"


def test_no_room_imports_the_entry() -> None:
    """Only `python -m trainer` does, a second entry; a rank gets the name of its program as text."""
    above = [name for name, file in modules().items() if imported_modules(file, {ENTRY.stem})]
    assert above == ["trainer.__main__"]


@pytest.mark.parametrize("room", ["configs", "trainer", "launch"])
def test_no_module_is_too_long(room: str) -> None:
    lines = {file: len(file.read_text().splitlines()) for file in (ROOT / room).glob("**/*.py")}
    assert {str(file): count for file, count in lines.items() if count > 400} == {}
    assert lines.get(ROOT / "trainer" / "loop.py", 0) < 250


def test_the_page_on_architecture_names_files_that_exist() -> None:
    named = re.findall(
        r"`((?:configs|data_pipeline|model|memory|eval|trainer|launch)/[\w/]+(?:\.py)?)`", PAGE.read_text()
    )
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_drawers() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "core"}
    found = [f for room in BELOW for f in (ROOT / room).glob("**/*.py") if drawers & {f.stem, *f.parts}]
    assert not found
