"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.full_disk import FULL

PARTIAL = ".partial"
_WRITERS = itertools.count()
_BLOCK = 1 << 20


def partial_of(path: Path) -> Path:
    """A hidden name beside `path` for what is not finished: this writer's own, by host, process and a count."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{next(_WRITERS)}{PARTIAL}")


def partials_of(path: Path) -> list[Path]:
    """What writers of `path`, running or dead, have beside it under names of `partial_of`."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"))


def remove_abandoned(path: Path) -> None:
    """Removes partial files and folders of `path` whose writer was a process of this host that has ended."""
    writer = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)-\d+{re.escape(PARTIAL)}")
    for partial in partials_of(path):
        name = writer.fullmatch(partial.name)
        if name and not _is_running(int(name[1])):
            remove(partial)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Gives the name of a partial file that takes the place of `path` when the block ends, and goes if it raises.

    Other writers of `path` have names of their own; the last to finish stays. What killed ones of this host left is
    removed. `durable` waits until the file and its name are on the disk.
    """
    remove_abandoned(path)
    partial = partial_of(path)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException as error:
        remove(partial)
        if isinstance(error, OSError) and error.errno and _is_of(partial, error):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    if durable:
        sync(path.parent)


def _is_of(partial: Path, error: OSError) -> bool:
    """Whether an error is of a partial file: it names that, or is of a full disk and names none, as writes do."""
    return partial.name in str(error) or (error.errno in FULL and error.filename is None)


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes text (UTF-8) or bytes to `path`, which holds all of it or what it held before; see `replacing`.

    A byte of a file's name that is not UTF-8 becomes an escape, as \\udcff.
    """
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in hex; `on_bytes` gets the length of each block that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()
