"""Secrets of addresses, and how they are kept out of every text that leaves: user, password and query of URLs.

Texts are cleaned by `without_secrets` where they are made, and once more on their way out (`clean_streams`). What was
cut from an address is remembered, for libraries quote parts of a password alone. Arguments with secrets are moved from
the command line, which every user of a machine can read, to the environment (`hide_arguments`).
"""

from __future__ import annotations

import io
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TypeVar

from configs.full_disk import FULL

T = TypeVar("T")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HOST = re.compile(r"(?:\[[^\]]*\]|localhost|[\w-]+(?:\.[\w-]+)+)(?::[0-9]*)?")  # beyond doubt: a user has no dot
_CLOSING = "'\")]>},:;."  # what may end a quotation of an address
_QUERY_ALONE = re.compile(r"(?<=[\w/])\?[\w.%~+-]+=\S*")
NO_SECRET = "workflowType=machine_learning"  # a query that stays: MLflow's menu of training, in addresses that we print
_HIDDEN = "RERANKVPR_ARGUMENT_"
_SHORTEST = 6  # characters of a secret that is looked for without its address
_MOST = 256

_known: dict[str, None] = {}
_pattern: re.Pattern[str] | None = None


def without_secrets(text: str, *, is_address: bool = False, remembered: bool = True) -> str:
    """A text whose addresses have lost user name, password and query: `http://ann:pw@host/x?key=1` is `http://host/x`.

    User and password are what stands before the last `@` of the authority (RFC 3986, section 3.2.1), and, since people
    do not always escape them, before the last `@` at all if the authority cannot be host and port. `is_address`: the
    text is an address and no sentence, so spaces end nothing. `remembered`: known secrets of six characters or more are
    replaced wherever they stand as a word.
    """
    if "://" in text or "?" in text:
        text = "".join(_cleaned(line, is_address) for line in text.splitlines(keepends=True))
    if remembered and _known:
        text = _known_secrets().sub("***", text)
    return text


def _cleaned(line: str, is_address: bool) -> str:
    """A line without the secrets of its addresses."""
    starts = list(_SCHEME.finditer(line))
    if not starts:
        return _QUERY_ALONE.sub(_forget_query, line)
    # An address alone may hold a password with spaces; in a sentence something follows its host.
    is_address |= not line[: starts[0].start()].strip() and not re.search(r"\s", line.rpartition("@")[2].strip())
    done = [_QUERY_ALONE.sub(_forget_query, line[: starts[0].start()])]
    at = starts[0].start()
    for number, scheme in enumerate(starts):
        if scheme.start() < at:
            continue  # inside the password of the one before
        done.append(line[at : scheme.end()] if number == 0 else scheme.group())
        following = [
            later.start() for later in starts[number + 1 :] if re.search(r"\s", line[scheme.end() : later.start()])
        ]
        stop = following[0] if following else len(line)
        done.append(_without_user_and_query(line[scheme.end() : stop], is_whole=is_address and not following))
        at = stop
    return "".join(done)


def _without_user_and_query(rest: str, *, is_whole: bool) -> str:
    """What follows `://`, to the next address or the end of the line; `is_whole` if it is the rest of an address."""
    body = rest.rstrip("\r\n")
    end = rest[len(body) :]
    run = body if is_whole else re.match(r"\S*", body)[0]  # type: ignore[index]
    cut = _end_of_user(run)
    if not cut and not is_whole and re.match(r"[^/?#\s@]*:(?![0-9]*(?:[/?#\s'\"),;]|$))", body) and "@" in body:
        first = body.index("@")
        run = body[: first + len(re.match(r"\S*", body[first:])[0])]  # type: ignore[index]
        cut = run.rindex("@") + 1
    _remember(run[: max(cut - 1, 0)], user=True)
    query = run.find("?", cut)
    if query < 0:
        return run[cut:] + body[len(run) :] + end
    kept_end = "" if is_whole else run[len(run.rstrip(_CLOSING)) :]
    if run[query + 1 : len(run) - len(kept_end)] == NO_SECRET:
        return run[cut:] + body[len(run) :] + end
    _remember(run[query + 1 : len(run) - len(kept_end)], user=False)
    return run[cut:query] + kept_end + body[len(run) :] + end


def _end_of_user(run: str) -> int:
    """Where host and port begin in what follows `://`; 0 if there is no user, the end if that cannot be told."""
    if "@" not in run or run.startswith("/"):  # no authority: the path of a file
        return 0
    before, before_query = run[: run.rindex("@")], run.partition("?")[0]
    if _HOST.fullmatch(re.split(r"[/?#]", run, maxsplit=1)[0]):
        return 0
    if "@" not in before_query:
        return len(run) if ":" in before_query else 0
    return len(before) + 1 if ":" in before or "/" not in before else 0


def _forget_query(match: re.Match[str]) -> str:
    found = match[0]
    kept = found[len(found.rstrip(_CLOSING)) :]
    _remember(found[1 : len(found) - len(kept)], user=False)
    return kept


def _remember(secret: str, *, user: bool) -> None:
    """Keeps a user's password, or a query's values, with the pieces that a parser of addresses might quote."""
    global _pattern
    values = [secret.partition(":")[2]] if user else [pair.partition("=")[2] for pair in secret.split("&")]
    for value in values:
        for form in (value, urllib.parse.unquote(value), urllib.parse.quote(value), *re.split(r"[/?#@:\s'\"]", value)):
            if len(form) >= _SHORTEST and form not in _known:
                _known[form] = None
                _pattern = None
    while len(_known) > _MOST:
        del _known[next(iter(_known))]


def _known_secrets() -> re.Pattern[str]:
    """Any of the known secrets, as a word."""
    global _pattern
    if _pattern is None:
        longest_first = sorted(_known, key=len, reverse=True)
        _pattern = re.compile("|".join(rf"(?<!\w){re.escape(secret)}(?!\w)" for secret in longest_first))
    return _pattern


class _CleanStream(io.TextIOWrapper):
    """A text stream that no secret goes out by."""

    def write(self, text: str) -> int:
        """Writes a text without secrets; returns the number of characters given."""
        super().write(without_secrets(text))
        return len(text)


class _CleanErrors(_CleanStream):
    """stderr, which loses what a full disk does not take: to report an error must not be another one."""

    def write(self, text: str) -> int:
        return _unless_full(lambda: super(_CleanErrors, self).write(text)) or len(text)

    def flush(self) -> None:
        _unless_full(super().flush)


def _unless_full(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except OSError as error:
        if error.errno not in FULL:
            raise
        return None


def clean_streams() -> None:
    """Takes the secrets out of all that this process prints: its own lines, tracebacks, warnings of libraries."""
    for name, kind in (("stdout", _CleanStream), ("stderr", _CleanErrors)):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            kept = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
            clean = kind(stream.detach(), **kept)
            setattr(sys, name, clean)
            setattr(sys, f"__{name}__", clean)


def hide_arguments() -> list[str]:
    """The arguments of this program as they were given, secrets included.

    An argument with a secret would be seen in `ps` by every user of the machine, here and in each process that is given
    it: this process starts itself again with a name in its place, and the argument in the environment.
    """
    own = sys.orig_argv[-len(sys.argv[1:]) :] == sys.argv[1:]  # not those of a process that this one was forked from
    if own and any(has_secret(word) for word in sys.argv[1:]):
        shown = hidden(sys.orig_argv[1:])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.execv(sys.executable, [sys.orig_argv[0], *shown])
    return revealed(sys.argv[1:])


def hidden(arguments: Sequence[str]) -> list[str]:
    """Arguments for a command line, those with secrets moved to this process's environment; see `revealed`."""
    names = []
    for word in arguments:
        if has_secret(word):
            taken = {value: key for key, value in os.environ.items() if key.startswith(_HIDDEN)}
            name = taken.get(word, f"{_HIDDEN}{len(taken)}")
            os.environ[name] = word
            names.append(name)
        else:
            names.append(word)
    return names


def revealed(arguments: Sequence[str]) -> list[str]:
    """Arguments with the hidden ones in their places."""
    return [os.environ.get(word, word) if word.startswith(_HIDDEN) else word for word in arguments]


def has_secret(word: str) -> bool:
    """Whether an argument holds an address with user, password or query."""
    return "://" in word and without_secrets(word, is_address=True, remembered=False) != word
