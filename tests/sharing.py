"""`pytest --share FOLDER`: processes that are given the same folder run each test once, in whichever of them is free.

A process takes the next piece that nobody has taken, by a file in the folder: the quick or the slow tests of a module,
or one check of several ranks. One starts with the quick pieces; others, with `--slow-first`, with the slow ones, the
longest ahead; each then takes the others' from their far end, so that all end together. See the Makefile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = ("test_eval_gardens", "test_golden", "test_global_loss")
SHOWN = 10
NOTED_S = 0.1  # less is among no ten slowest

Piece = tuple[str, list[pytest.Item]]


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharing")
    group.addoption("--share", metavar="FOLDER", type=Path, help="share the tests with others of this folder")
    group.addoption("--slow-first", action="store_true", help="start with the slow tests (with --share)")


class Sharing:
    """The plug-in of one of the processes."""

    def __init__(self, folder: Path, slow_first: bool) -> None:
        self.folder, self.slow_first = folder, slow_first
        self.durations: list[tuple[float, str]] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """pytest's own loop, over the pieces that this process takes."""
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest says which modules could not be imported
        for piece in self.taken(in_order(pieces(session.items), self.slow_first)):
            for item, following in zip(piece, [*piece[1:], None], strict=True):
                # After the last one all goes but what is the session's, which goes at its end.
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=following or session)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
        return True

    def taken(self, pieces: list[Piece]) -> Iterator[list[pytest.Item]]:
        """The pieces that no other process has taken when their turn comes."""
        for name, items in pieces:
            try:
                (self.folder / name).touch(exist_ok=False)
            except FileExistsError:
                continue
            yield items

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.duration >= NOTED_S:
            self.durations.append((report.duration, f"{report.when:<8} {report.nodeid}"))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The slowest of all processes that have ended, so that the last one shows those of all."""
        (self.folder / f"durations-{os.getpid()}.json").write_text(json.dumps(self.durations))
        ended = sorted(self.folder.glob("durations-*.json"))
        slowest = sorted((tuple(one) for file in ended for one in json.loads(file.read_text())), reverse=True)
        terminalreporter.write_sep("=", f"slowest {SHOWN} of {len(ended)} processes")
        for seconds, what in slowest[:SHOWN]:
            terminalreporter.write_line(f"{seconds:.2f}s {what}")


def pieces(items: list[pytest.Item]) -> list[Piece]:
    """Tests that belong together, by a name that is the same in every process."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        module = item.nodeid.partition("::")[0].replace("/", ".").removesuffix(".py")
        name = f"{module}-{'slow' if is_slow(item) else 'quick'}"
        if is_slow(item) and "world_size" in getattr(item, "fixturenames", ()):
            name += f"-{item.name}"
        found.setdefault(name, []).append(item)
    return list(found.items())


def in_order(pieces: list[Piece], slow_first: bool) -> list[Piece]:
    quick, slow = ([piece for piece in pieces if is_slow(piece[1][0]) == wanted] for wanted in (False, True))
    slow.sort(key=lambda piece: next((i for i, name in enumerate(LONGEST) if name in piece[0]), len(LONGEST)))
    return slow + quick[::-1] if slow_first else quick + slow[::-1]


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None
