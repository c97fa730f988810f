"""One writer per folder: a lock that a crash releases, on local disks and on file systems that hosts share.

The lock is a hidden file that its holder keeps locked by `flock`. It names the holder and its machine, and carries a
beat while the holder lives. Within one machine `flock` decides: the kernel drops it with the process.
Between machines it proves nothing (some file systems keep it to one machine, some for minutes after a machine died), so
a lock of another machine counts while its beat continues, by the monotonic clock of the machine that looks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.reading import shown

LOCK = ".rerankvpr.lock"
PART_LOCK = f"{LOCK}.part-"  # of one of several that write parts of a folder together
BEAT_S = 5.0
DEAD_S = 45.0  # without a beat, the holder on another machine is taken for dead
_SIZE = 1024
_RESTARTED_S = 150.0  # in which ranks of an earlier start, cut off from the others, have ended
_PROBED_S = 0.5  # others look at a lock for an instant, see `holder`


class LockedError(ValueError):
    """A folder that another process writes to; one line with who, where and since when."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    what: str
    host: str
    pid: int
    machine: str  # the kernel's boot, which tells a machine from another of the same name
    since: str

    def __str__(self) -> str:
        return f"another process ({self.what}, pid {self.pid} on {self.host}, since {self.since})"


_NOT_SEEN = object()
_UNKNOWN = Holder("unnamed", "an unknown host", 0, "", "an unknown time")


class FolderLock:
    """The right to write to a folder, for as long as the `with` block lasts or until `release`."""

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        name: str = LOCK,
        of: Path | None = None,
        say: Callable[[str], None] | None = None,
        dead_s: float = DEAD_S,
    ) -> None:
        """`what` names the holder to others; `say` gets a line if another machine's lock is waited for.

        `of` is a file in the folder, if a lock of a `name` of its own is of that alone; messages then name it.
        """
        self.folder, self.path, self._dead_s = folder, folder / name, dead_s
        self._of = of or folder
        self._say = say or (lambda text: print(f"rerankvpr: {text}", file=sys.stderr, flush=True))
        self._mine = Holder(what, os.uname().nodename, os.getpid(), _machine(), time.strftime("%Y-%m-%d %H:%M:%S"))
        self._file: int | None = None
        self._made: list[Path] = []  # folders that were not there
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether this lock is held by this object."""
        return self._file is not None

    def acquire(self) -> None:
        """Takes the lock; makes the folder if it is not there.

        Raises LockedError if another process holds it, OSError naming the folder if nothing can be written there, and
        ValueError for a name that is not UTF-8: checkpoints and tables could be written under it, but not be read.
        """
        if self._file is not None:
            return
        try:
            str(self._of).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{shown(self._of)}: a name that is not UTF-8; give another") from error
        try:
            self._make_folder()
            self._file = self._take()
        except LockedError:
            self._remove_folders()
            raise
        except OSError as error:
            self._remove_folders()
            reason = error.strerror or error
            raise type(error)(f"{self._of}: cannot be written to ({reason})") from error
        self._released.clear()
        self._beating = threading.Thread(target=self._beat, args=(self._file,), name="folder lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Gives the lock back; nothing is left of it."""
        if self._file is None:
            return
        file, self._file = self._file, None
        self._released.set()
        if self._beating:
            self._beating.join(BEAT_S)
        with contextlib.suppress(OSError):
            if _is_at(file, self.path):
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(file)
        self._remove_folders()

    def _make_folder(self) -> None:
        for folder in (self.folder, *self.folder.parents):
            if folder.exists():
                break
            self._made.append(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_folders(self) -> None:
        """Removes the folders that the lock made, if nothing was written to them."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()
        self._made = []

    def _take(self) -> int:
        began = time.monotonic()
        beat: Any = _NOT_SEEN
        while True:
            file, is_new = _open(self.path)
            kept = False
            try:
                locked = _flock(file)
                if locked and not _is_at(file, self.path):
                    continue  # it was released, and removed, since it was opened
                found, seen = _read(file)
                here = found is None or found.machine == self._mine.machine
                if (locked and here) or (locked is None and is_new):
                    kept = True
                    return self._keep(file)
                if beat is _NOT_SEEN:
                    beat = seen
                    if not here:
                        self._say(f"{self._of}: {found} may be writing there; waiting for a sign of it")
                elif seen != beat:
                    raise LockedError(self._refusal(found))
                waited_s = time.monotonic() - began
                if locked is False and here and waited_s > _PROBED_S:
                    raise LockedError(self._refusal(found))
                if waited_s > self._dead_s:
                    silent = f"gave no sign of life for {self._dead_s:g} s"
                    if locked is False:
                        raise LockedError(
                            f"{self._refusal(found)}; it {silent}: if that machine is dead, its file system may keep "
                            f"the lock for minutes; remove {self.path} if you know that nothing runs there"
                        )
                    self._say(f"{self._of}: {found or _UNKNOWN} {silent}: taken over")
                    kept = True
                    return self._keep(file, is_sure=locked is True)
            finally:
                if not kept:
                    os.close(file)
            time.sleep(0.1)

    def _refusal(self, found: Holder | None) -> str:
        other = "folder" if self._of == self.folder else "name"
        return f"{self._of}: {found or _UNKNOWN} is writing there; wait until it has ended, or give another {other}"

    def _keep(self, file: int, *, is_sure: bool = True) -> int:
        """The file, with this holder written into it."""
        self._write(file, 0)
        if not is_sure:  # a file system without locks: of two that came at once, the last to write has it
            time.sleep(min(1.0, self._dead_s / 4))
            again, _ = _open(self.path)
            found, _ = _read(again)
            os.close(again)
            if found and found != self._mine:
                raise LockedError(self._refusal(found))
        return file

    def _write(self, file: int, beat: int) -> None:
        line = json.dumps({**asdict(self._mine), "beat": beat}).encode()
        with contextlib.suppress(OSError):  # a full disk: flock holds without a name
            os.pwrite(file, line[: _SIZE - 1].ljust(_SIZE - 1) + b"\n", 0)
            os.fsync(file)

    def _beat(self, file: int) -> None:
        beat = 0
        while not self._released.wait(BEAT_S):
            beat += 1
            self._write(file, beat)


def lock_of(file: Path, what: str) -> FolderLock:
    """The lock of one file, or of a folder as a whole, beside it: others may write to other names there."""
    name = f"{LOCK}.{hashlib.sha256(os.fsencode(file.name)).hexdigest()[:16]}"
    return FolderLock(file.parent, what, name=name, of=file)


def lock_name(part: tuple[int, int] | None) -> str:
    """The name of the lock of a folder, or of part i of n of it."""
    return f"{PART_LOCK}{part[0]}-of-{part[1]}" if part else LOCK


def refuse_others(folder: Path, part: tuple[int, int] | None) -> None:
    """Raises LockedError if a writer of a part meets one of the whole folder, or one of the whole one of a part.

    Called once one's own lock is held: of two that come at once, one at least sees the other.
    """
    others = [LOCK] if part else [path.name for path in folder.glob(f"{PART_LOCK}*")]
    for other in others:
        if found := holder(folder, name=other):
            raise LockedError(f"{folder}: {found} is writing there; wait until it has ended")


@contextlib.contextmanager
def held_by_rank_0(folder: Path, what: str, part: tuple[int, int] | None = None) -> Iterator[None]:
    """Holds a folder for all ranks of the process group, by rank 0; every rank must call this.

    With `part` (i, n) it is held beside those that write other parts. Every rank raises what rank 0 met: LockedError if
    another process holds the folder, OSError if it cannot be written to. A job that was started again waits for what
    may be left of its earlier start on another machine.
    """
    lock = FolderLock(folder, what, name=lock_name(part))
    restarts = (os.environ.get(key, "0") for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    patience_s = _RESTARTED_S if any(count not in ("", "0") for count in restarts) else 0.0
    from configs.ranks import from_rank_0  # torch, which other holders of folders need not wait for

    from_rank_0(lambda: _acquire(lock, patience_s))
    try:
        from_rank_0(lambda: refuse_others(folder, part))
        yield
    finally:
        lock.release()


def _acquire(lock: FolderLock, patience_s: float) -> None:
    """Takes a lock, again and again for so long."""
    began = time.monotonic()
    while True:
        try:
            return lock.acquire()
        except LockedError:
            if time.monotonic() - began > patience_s:
                raise
            time.sleep(1.0)


def holder(folder: Path, *, name: str = LOCK, dead_s: float = DEAD_S) -> Holder | None:
    """Who writes to a folder; None if nobody does. A lock of another machine is watched for `dead_s` at most."""
    began = time.monotonic()
    beat: Any = _NOT_SEEN
    while True:
        try:
            file = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            locked = _flock(file, shared=True)
            found, seen = _read(file)
        finally:
            os.close(file)
        here = found is None or found.machine == _machine()
        if locked and here:
            return None
        if (locked is False and here) or (beat is not _NOT_SEEN and seen != beat):
            return found or _UNKNOWN
        beat = seen
        if time.monotonic() - began > dead_s:
            return (found or _UNKNOWN) if locked is False else None
        time.sleep(0.1)


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether it was made by this call."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        pass
    try:
        return os.open(path, flags), False
    except FileNotFoundError:  # released between the two
        return _open(path)


def _flock(file: int, *, shared: bool = False) -> bool | None:
    """True if it was taken, False if another holds it, None on a file system without locks."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(file: int) -> tuple[Holder | None, Any]:
    """Who a lock file names, and its beat."""
    for _ in range(3):  # a network file system may show half of a write
        try:
            content = os.pread(file, _SIZE, 0)
            if not content:
                break
            said = json.loads(content)
            beat = said.pop("beat")
            found = Holder(**said)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            time.sleep(0.05)
        else:
            return found, (beat, found.pid, found.since)
    return None, None


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        there, here = path.stat(), os.fstat(file)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _machine() -> str:
    """What tells this boot of this machine from all others; containers of one machine share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
