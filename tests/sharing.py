"""`pytest --processes N`: all is imported and collected once, then N forks of that process run each test once.

A fork takes the next piece that nobody has taken: the quick or the slow tests of a module, or one check of several
ranks. The first fork begins with the quick pieces, the others with the slow ones, the longest ahead, so that all end
together. What they report goes to the first process, which shows it as pytest shows its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import IO, Any

import pytest

LONGEST = ("test_eval_gardens", "test_canary", "test_golden", "test_model_training", "test_index_g", "test_export")
SAID = 4000  # characters that are shown of a fork that died
ENDS_S = 60.0  # seconds that a stopped fork has to end what its tests started
PASSED, FAILED = 0, 1  # what a fork may end with: its reports say the rest

Piece = list[pytest.Item]


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--processes", metavar="N", type=int, default=1, help="run the tests in N forks of this process")


@dataclass
class Fork:
    """One of the processes that run tests, as the first one sees it."""

    pid: int
    printed: IO[bytes]
    running: str = "no test"

    def has_ended(self) -> bool:
        """Whether it has, and leaves it for `ended` to wait for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ended(self) -> str:
        """Waits for its end; what went wrong with it, empty if nothing did but tests."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status in (PASSED, FAILED):
            return ""
        self.printed.seek(0)
        said = self.printed.read().decode(errors="replace")[-SAID:]
        return f"process {self.pid} ended with status {status}, in {self.running}; it printed:\n{said}"


class Sharing:
    """The plug-in of the first process; in its forks too, which leave its loop as soon as they are made."""

    def __init__(self, processes: int, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called ahead of the forks."""
        self.processes, self.before = processes, before

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """In place of pytest's own loop. Raises as that does when it is to stop."""
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest says which modules could not be imported
        left = Left(in_order(session.items))
        self.before()
        gc.freeze()  # memory that no fork collects stays shared
        forks: dict[Connection, Fork] = {}
        for number in range(self.processes):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            printed = tempfile.TemporaryFile()  # noqa: SIM115 - for the life of the fork
            pid = os.fork()
            if pid == 0:
                ours.close()
                signal.signal(signal.SIGINT, _stop_once)
                _print_to(printed, session.config)
                session.config.pluginmanager.register(Reports(theirs, session.config))
                return _run(session, left.pieces(from_the_end=number == 0))
            theirs.close()
            forks[ours] = Fork(pid, printed)
        gc.unfreeze()
        try:
            for pipe, name, content in _received(list(forks)):
                if name == "pytest_runtest_logstart":
                    forks[pipe].running = content["nodeid"]
                else:
                    _tell(session.config, name, content)
                _stop_if_asked(session)
        except BaseException:
            _stop(forks.values())
            raise
        for fork in forks.values():
            if fault := fork.ended():
                session.config.get_terminal_writer().line(f"\n{fault}", red=True)
                session.testsfailed += 1
        return True


class Reports:
    """The plug-in of a fork that sends what it finds to the first process."""

    def __init__(self, pipe: Connection, config: pytest.Config) -> None:
        self.pipe, self.config = pipe, config

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.pipe.send(("pytest_runtest_logstart", {"nodeid": nodeid}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        content = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.pipe.send(("pytest_runtest_logreport", content))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self.pipe.send(("pytest_runtest_logfinish", {"nodeid": nodeid, "location": location}))

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str, location: Any) -> None:
        content = {"when": when, "nodeid": nodeid, "location": location}
        warning_message.source = None  # what it was raised about may not be sent
        self.pipe.send(("pytest_warning_recorded", {"warning_message": warning_message, **content}))


class Left:
    """Pieces that nobody has taken, between two places that all forks share."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.all = pieces
        self.ends = multiprocessing.get_context("fork").Array("i", [0, len(pieces)])

    def pieces(self, from_the_end: bool) -> Iterator[Piece]:
        """Each next one, once it is asked for."""
        while True:
            with self.ends.get_lock():
                first, end = self.ends
                if first == end:
                    return
                self.ends[1 if from_the_end else 0] += -1 if from_the_end else 1
            yield self.all[end - 1 if from_the_end else first]


def in_order(items: list[pytest.Item]) -> list[Piece]:
    """Tests that belong together: slow pieces, those that take longest first, then quick ones."""
    found: dict[tuple[str, ...], Piece] = {}
    for item in items:
        name = (item.nodeid.partition("::")[0], "slow" if is_slow(item) else "quick")
        if is_slow(item) and "world_size" in getattr(item, "fixturenames", ()):
            name += (item.name,)
        found.setdefault(name, []).append(item)
    slow = [(name, piece) for name, piece in found.items() if name[1] == "slow"]
    slow.sort(key=lambda one: next((i for i, long in enumerate(LONGEST) if long in one[0][0]), len(LONGEST)))
    return [piece for _, piece in slow] + [piece for name, piece in found.items() if name[1] == "quick"][::-1]


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _stop(forks: Iterable[Fork]) -> None:
    """Ends forks as Ctrl-C does: fixtures end what they have started. One that takes longer than `ENDS_S` is killed."""
    running = list(forks)
    for fork in running:
        os.kill(fork.pid, signal.SIGINT)  # one that has ended is there until it is waited for
    deadline = time.monotonic() + ENDS_S
    try:
        while running and time.monotonic() < deadline:
            time.sleep(0.02)
            running = [fork for fork in running if not fork.has_ended()]
    finally:
        for fork in running:
            os.kill(fork.pid, signal.SIGKILL)


def _stop_once(number: int, frame: FrameType | None) -> None:
    """What SIGINT does in a fork. A terminal sends it to all processes, and the first process once more."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(session: pytest.Session, pieces: Iterator[Piece]) -> bool:
    for piece in pieces:
        for item, following in zip(piece, [*piece[1:], None], strict=True):
            # After the last one all goes but what is the session's, which goes at its end.
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following or session)
            _stop_if_asked(session)
    return True


def _stop_if_asked(session: pytest.Session) -> None:
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def _print_to(file: IO[bytes], config: pytest.Config) -> None:
    """Lets what this process prints go to a file; what tests print is captured apart from other forks."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    capture.start_global_capturing()
    capture.suspend_global_capture()


def _received(pipes: list[Connection]) -> Iterator[tuple[Connection, str, dict[str, Any]]]:
    """What forks send, until all have ended."""
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                name, content = pipe.recv()
            except EOFError:
                pipes.remove(pipe)
            else:
                yield pipe, name, content


def _tell(config: pytest.Config, name: str, content: Mapping[str, Any]) -> None:
    if name == "pytest_runtest_logreport":
        report = config.hook.pytest_report_from_serializable(config=config, data=content)
        config.hook.pytest_runtest_logreport(report=report)
    elif name == "pytest_warning_recorded":
        config.hook.pytest_warning_recorded.call_historic(kwargs=dict(content))
    else:
        getattr(config.hook, name)(**content)
