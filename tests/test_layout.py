"""Imports point down only, and every room is guessable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BELOW = {
    "configs": set(),
    "data_pipeline": {"configs"},
    "model": {"configs"},
    "memory": {"configs"},
    "eval": {"data_pipeline", "model", "configs"},
    "trainer": {"eval", "memory", "model", "data_pipeline", "configs"},
    "launch": {"trainer", "eval", "memory", "model", "data_pipeline", "configs"},
}


def imported_rooms(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
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


def test_no_drawers() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "core"}
    found = [f for room in BELOW for f in (ROOT / room).glob("**/*.py") if drawers & {f.stem, *f.parts}]
    assert not found
