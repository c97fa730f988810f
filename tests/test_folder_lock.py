"""One writer per folder: refused in one line, released by a crash, honest between machines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipeline import folder_lock
from data_pipeline.folder_lock import LOCK, FolderLock, Holder, LockedError, holder

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = Holder("rerankvpr train", "node7", 4242, "another boot", "2026-01-01 00:00:00")
HOLD = """
import sys, time
from pathlib import Path
from data_pipeline.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), "rerankvpr train"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_by_a_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def beat_of(folder: Path, number: int, who: Holder = ELSEWHERE) -> None:
    """What a holder writes, without the kernel's lock: another machine's, or a file system that has none."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, json.dumps({**asdict(who), "beat": number}).encode().ljust(1023) + b"\n", 0)
    os.close(file)


@contextlib.contextmanager
def beating(folder: Path, who: Holder = ELSEWHERE) -> Iterator[None]:
    stop = threading.Event()

    def run() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            beat_of(folder, number, who)

    beat_of(folder, 0, who)
    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_the_second_is_refused_in_one_line_that_says_who(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held_by_a_process(out) as process:
        with pytest.raises(LockedError) as error, FolderLock(out, "rerankvpr sync"):
            pass
        assert str(error.value).startswith(f"{out}: another process (rerankvpr train, pid {process.pid} on ")
        assert "\n" not in str(error.value)
        assert str(holder(out)).startswith(f"another process (rerankvpr train, pid {process.pid}")
    # Killed: the kernel has let go, and what is left of the lock hinders nobody.
    assert (out / LOCK).exists()
    assert holder(out) is None
    with FolderLock(out, "rerankvpr train"):
        assert holder(out) is not None
    assert list(tmp_path.iterdir()) == [out]
    assert list(out.iterdir()) == []


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b", "test"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_that_come_at_once_gets_it(tmp_path: Path) -> None:
    held, refused, inside = [], [], []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        try:
            with FolderLock(tmp_path, "test"):
                inside.append(1)
                held.append(len(inside))
                time.sleep(1.5)
                inside.pop()
        except LockedError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, len(refused)) == ([1], 7)


@pytest.fixture(params=["flock", "none"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with locks, and one without."""
    if request.param == "none":
        monkeypatch.setattr(fcntl, "flock", no_locks)


@pytest.mark.usefixtures("locks")
def test_a_living_holder_on_another_machine_is_heard(tmp_path: Path) -> None:
    with beating(tmp_path):
        with pytest.raises(LockedError, match=r"rerankvpr train, pid 4242 on node7, since 2026-01-01"):
            FolderLock(tmp_path, "test", dead_s=20).acquire()
        assert holder(tmp_path, dead_s=20) == ELSEWHERE


@pytest.mark.usefixtures("locks")
def test_the_lock_of_a_dead_machine_is_explained_and_taken_over(tmp_path: Path) -> None:
    beat_of(tmp_path, 5)
    said: list[str] = []
    with FolderLock(tmp_path, "test", say=said.append, dead_s=0.4):
        assert "pid 4242 on node7" in said[0]
        assert said[1].endswith("gave no sign of life for 0.4 s: taken over")
        assert "node7" not in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_a_file_system_keeps_for_a_dead_machine_is_explained(tmp_path: Path) -> None:
    beat_of(tmp_path, 5)
    with (tmp_path / LOCK).open() as kept:  # as an NFS server does for a client that is gone
        fcntl.flock(kept, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match=f"if that machine is dead, .* remove {tmp_path / LOCK} if you know"):
            FolderLock(tmp_path, "test", say=lambda _: None, dead_s=0.4).acquire()


def test_without_locks_of_the_file_system_the_beat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.1)
    with FolderLock(tmp_path, "first"), pytest.raises(LockedError, match="first"):
        FolderLock(tmp_path, "second", dead_s=20).acquire()
    beat_of(tmp_path, 1, replace(ELSEWHERE, machine=folder_lock._machine()))  # this machine's, killed
    with FolderLock(tmp_path, "third", say=lambda _: None, dead_s=0.4):
        pass


def no_locks(file: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from data_pipeline.folder_lock import FolderLock\n"
    code += "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    code += "try: FolderLock(Path(sys.argv[1]), 'test').acquire()\nexcept OSError as error: print(error)"
    read_only = tmp_path / "shared"
    read_only.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    for out in (read_only, read_only / "new"):
        command = [sys.executable, "-c", code, str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines() == [f"{out}: cannot be written to (Permission denied)"], done.stderr


def test_a_damaged_or_foreign_lock_file_hinders_nobody(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 1024, b"[]", b"{}", b'{"beat": 1, "pid": "x"}', b"\xff\xfe"):
        (tmp_path / LOCK).write_bytes(content)
        with FolderLock(tmp_path, "test"):
            pass
