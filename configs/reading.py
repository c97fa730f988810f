"""What a damaged or hostile file makes a library raise, as one line that names the file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.secrets import without_secrets

NO_THREAD = "can't start new thread"  # no memory for its stack, or at the system's limit of threads
_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "bad_alloc", "Unable to allocate", "Insufficient memory"),
    *(os.strerror(errno.ENOMEM), NO_THREAD),
    '"aten::empty"',  # TorchCodec's, where an older torch (2.11) keeps the reason to itself
)
LONGEST = 300  # characters of a reason, and of a value that a message shows
_AROUND = 100  # characters before and after a byte of a name that is wrong


@contextmanager
def reading(file: str | Path, expected: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Raises `kind`, naming the file and what was `expected` in it, whatever the block raises.

    Libraries raise nearly everything on damaged bytes: KeyError, RuntimeError, RecursionError, kinds of their own. An
    error that names the file already passes if it is `kind` or the system's (no such file, no permission). A file that
    asks for more memory than there is (a header of 10^12 rows) is damaged too. Keep the block short: one reader,
    nothing of ours that could be wrong.
    """
    if _is_special(file):
        raise kind(f"{file}: a pipe, socket or device; expected a regular file")
    try:
        yield
    except Exception as error:
        if isinstance(error, kind) and str(file) in str(error):
            raise
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        too_large = ", or too large for this machine's memory" if is_out_of_memory(error) else ""
        raise kind(f"{file}: not {expected}{too_large} ({reason(error)})") from error


def _is_special(file: str | Path) -> bool:
    """Whether this is a file that may hold its reader for ever."""
    try:
        mode = os.stat(file).st_mode  # noqa: PTH116 - may be a name that is no path
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_regular(path: str | Path) -> int:
    """A descriptor of a regular file, for reading. Raises OSError for a pipe, device, socket or folder.

    Opened without waiting: a pipe that nobody writes would hold its reader for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file; see `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def reason(error: BaseException) -> str:
    """An error in one bounded line: its first line, or its kind where it says nothing; a key is named as one."""
    text = shown(without_secrets(next(iter(said_by(error).splitlines()), "")))
    if isinstance(error, KeyError):
        return f"no {text}"
    return text or {"EOFError": "cut off", "RecursionError": "nested too deeply"}.get(
        type(error).__name__, type(error).__name__
    )


def said_by(error: BaseException) -> str:
    """An error's text; of a name that is not UTF-8, which Python does not show, the name."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":
        name = error.object[max(0, error.start - _AROUND) : error.end + _AROUND]
        return f"{shown(name)} is not UTF-8, as names in tables must be; rename it"
    return str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, in the words of torch, numpy, libjpeg, C++ or the system."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def as_utf_8(name: str) -> str:
    """A file's name for tables and pictures: bytes that are not UTF-8 become escapes, as \\udcff."""
    return name.encode(errors="backslashreplace").decode()


def shown(value: object) -> str:
    """A value as a message shows it: one printable line of at most `LONGEST` characters."""
    text = str(value)[: LONGEST + 1]
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
