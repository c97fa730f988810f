"""Mutation fuzzing of everything that reads a file: `python -m tests.fuzzing [READER...] --mutations N [--json FILE]`.

Each reader (tests/fuzz_readers.py) is given N mutations of valid files, in a process of its own with bounded memory. A
mutation must end in a value, in a value with a counted skip, or in an error of one line that names the file, within
`LIMIT_S`; anything else (another kind of error, a crash, memory, time) is a failure, and the file is kept. Each file is
also once a pipe that nobody writes. Times are of processors, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests import forked
from trainer.errors import lines_of

LIMIT_S = 10.0  # of processor time, for one mutation; these files take milliseconds
WAITS_S = 60.0  # by the clock, for one mutation: a pipe, a lock
HANGS_S = 300.0  # beyond all mutations together
LIMIT_BYTES = 2 << 30  # of address space beyond what the process has once the reader is warm
LONGEST_LINE, MOST_LINES = 2100, 41

INTERESTING = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**62, 2**63 - 1)
TOKENS = (
    *("null", "[]", "{}", "true", '""', "-1", "0", "1e400", "NaN", "-Infinity", "1000000000000", "1e-320", "0.5"),
    *(str(2**63), str(2**64), "-9223372036854775809", "\\u0000", "\ud83d", "'", '"', ",", "\n", ";", "..", "../../x"),
    *(
        "[" * 5000,
        '{"a":' * 2000,
        "&a [*a]",
        "<<: *a",
        "!!python/object/apply:os.system [id]",
        "~",
        "/dev/zero",
        "é",
        "٣",
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, [], {}, True, False, "", "x", -1, 0, 0.5, 10**12, 2**63, -(2**63) - 1, 1e308, float("nan"), float("inf")),
    *(["x"], {"x": 1}, [[]], "\0", "../../x", "/etc/passwd", "x" * 10_000, "٣", [None], {"": {}}, "1", "é\ud83d"),
)

Make = Callable[[Path], list[Path]]
Read = Callable[[Path, Path], bool]  # reads the mutated file in its folder; whether something was skipped and counted


@dataclass(frozen=True)
class Reader:
    """How valid files are made in a folder (those to mutate are returned), and how the folder is read."""

    make: Make
    read: Read
    after: Callable[[Path], None] = lambda _: None  # mends checksums over the mutated file, so that more is reached
    names: Callable[[Path], list[str]] | None = None  # what an error may name; the mutated file's name by default


@dataclass
class Outcome:
    """What the mutations of a reader ended in."""

    reader: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("mutations", "values", "skips", "errors"), 0))
    seconds: float = 0.0  # of processor time
    slowest_s: float = 0.0
    peak_mb: float = 0.0
    failures: list[str] = field(default_factory=list)


def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to four changes of a file's bytes; where it is JSON or text, often of a value in it."""
    if rng.random() < 0.02:
        return rng.choice([b"", b"\0" * len(data), rng.randbytes(len(data)), rng.choice(others), b"null", b"[]", b"{}"])
    if rng.random() < 0.5 and (changed := _mutate_json(rng, data)) is not None:
        return changed
    out = bytearray(data)
    is_text = _is_text(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changes = (_flip, _set, _number, _cut, _drop, _repeat, _insert, _splice)
        change = _token if is_text and rng.random() < 0.6 else rng.choice(changes)
        out = change(rng, out, others)
    return bytes(out)


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data[:4096].decode()
    except UnicodeDecodeError:
        return False


def _at(rng: random.Random, data: bytearray) -> int:
    """A position: headers and footers more often than the middle, where most bytes are pixels and numbers."""
    size, near = len(data), min(len(data), 512)
    return rng.choice((rng.randrange(size + 1), rng.randrange(near + 1), size - rng.randrange(near + 1)))


def _flip(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[min(_at(rng, data), len(data) - 1)] ^= 1 << rng.randrange(8)
    return data


def _set(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = _at(rng, data)
    data[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
    return data


def _number(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    """A binary number of 2, 4 or 8 bytes."""
    at, (width, code) = _at(rng, data), rng.choice(((2, "H"), (4, "I"), (8, "Q")))
    value = rng.choice(INTERESTING) % (1 << 8 * width)
    data[at : at + width] = struct.pack(rng.choice("<>") + code, value)
    return data


def _cut(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    return data[: _at(rng, data)]


def _drop(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = _at(rng, data)
    del data[at : at + rng.choice((1, 4, 100, 5000))]
    return data


def _repeat(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = _at(rng, data)
    part = data[at : at + rng.choice((1, 8, 200))]
    data[at:at] = part * rng.choice((1, 2, 50))
    return data


def _insert(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = _at(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
    return data


def _splice(rng: random.Random, data: bytearray, others: list[bytes]) -> bytearray:
    """The end of another file."""
    other = rng.choice(others)
    at = _at(rng, data)
    return data[:at] + other[at:]


def _token(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    """A word or number of a text replaced, or something put before it."""
    words = list(re.finditer(rb"[\w.+-]+", bytes(data[: 1 << 16])))
    token = rng.choice(TOKENS).encode("utf-8", "surrogatepass")
    if not words:
        return bytearray(token)
    word = rng.choice(words)
    data[word.start() if rng.random() < 0.8 else word.end() : word.end()] = token
    return data


def _mutate_json(rng: random.Random, data: bytes) -> bytes | None:
    """A JSON document (or line of JSON lines) with one node replaced, removed or renamed; None where it is none."""
    if data[:1] not in (b"{", b"["):
        return None
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    at = rng.randrange(len(lines))
    try:
        document = json.loads(lines[at])
    except ValueError:
        return None
    holders: list[tuple[Any, Any]] = [([document], 0)]
    root = holders[0][0]
    stack = [(root, 0)]
    while stack:
        holder, key = stack.pop()
        node = holder[key]
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for inner in keys:
            holders.append((node, inner))
            stack.append((node, inner))
    holder, key = rng.choice(holders)
    if isinstance(holder, dict) and rng.random() < 0.3:
        value = holder.pop(key)
        if rng.random() < 0.5:
            holder[rng.choice(("x", "", str(key) + "s", "../x", "\0"))] = value
    else:
        holder[key] = rng.choice(VALUES)
    try:
        lines[at] = json.dumps(root[0]).encode()
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def fuzz(name: str, reader: Reader, mutations: int, seed: int, folder: Path) -> Outcome:
    """Reads `mutations` mutated folders; to be called in a process of its own."""
    valid = folder / "valid"
    valid.mkdir(parents=True)
    files = reader.make(valid)
    contents = {file: file.read_bytes() for file in files}
    others = [*contents.values(), b"\x89PNG\r\n\x1a\n" + bytes(64), b"PAR1" + bytes(64), b"PK\x03\x04" + bytes(64)]
    outcome, rng = Outcome(name), random.Random(f"{name} {seed}")
    for file in files:
        reader.read(valid, file)  # what is valid must be read; imports and caches are not counted
    _limit_memory()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _too_long)
    began = _processor_s()
    pipes = list(files)  # each file once as a pipe that nobody writes, then mutations
    for number in range(len(pipes) + mutations):
        pipe = number < len(pipes)
        file = pipes[number] if pipe else rng.choice(files)
        file.unlink()
        os.mkfifo(file) if pipe else file.write_bytes(mutate(rng, contents[file], others))
        (folder / "last.txt").write_text(f"{number} {file}")
        started = time.process_time()
        failure = ""
        try:
            if not pipe:
                reader.after(file)
            _start_timers(LIMIT_S, WAITS_S)
            try:
                skipped = reader.read(valid, file)
            finally:
                _start_timers(0, 0)
        except (ValueError, OSError) as error:
            failure = _not_one_line(error, reader.names(file) if reader.names else [file.name, str(file.parent)])
            outcome.counts["errors"] += 1
        except BaseException as error:  # noqa: BLE001 - what must not be
            failure = f"{type(error).__name__}: {error!s:.300}\n{_where(error)}"
        else:
            outcome.counts["skips" if skipped else "values"] += 1
        outcome.slowest_s = max(outcome.slowest_s, time.process_time() - started)
        outcome.counts["mutations"] += 1
        if failure:
            kept = folder / f"failure-{number}-{file.name}"
            if not pipe:
                shutil.copy(file, kept)
            outcome.failures.append(f"{kept}: {failure}")
            if len(outcome.failures) >= 20:
                break
        file.unlink()
        file.write_bytes(contents[file])
        reader.after(file)
    outcome.seconds = _processor_s() - began
    outcome.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return outcome


def _not_one_line(error: Exception, names: list[str]) -> str:
    """What is wrong with an error's text; empty if it is a line (one per fault) that names the file."""
    lines = lines_of(error)
    text = "\n".join(lines)
    if not 1 <= len(lines) <= MOST_LINES or max(map(len, lines)) > LONGEST_LINE:
        return f"{len(lines)} lines, the longest of {max(map(len, lines), default=0)}: {text:.300}"
    if not all(any(name in line for name in names) for line in lines):
        return f"names no file: {type(error).__name__}: {text:.300}\n{_where(error)}"
    return ""


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])


def _start_timers(processor_s: float, clock_s: float) -> None:
    """Sends SIGPROF and SIGALRM when so much time is over, again and again; 0 stops them."""
    signal.setitimer(signal.ITIMER_PROF, processor_s, processor_s)
    signal.setitimer(signal.ITIMER_REAL, clock_s, clock_s)


def _too_long(number: int, _frame: object) -> None:
    limit = f"{LIMIT_S:g} s of a processor" if number == signal.SIGPROF else f"{WAITS_S:g} s"
    raise TimeoutError(f"longer than {limit}")  # an OSError that names no file


def _processor_s() -> float:
    """Processor time of this process and of those that it started."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz_in_child(name: str, mutations: int, seed: int, folder: Path) -> Outcome:
    """`fuzz` in a process of its own; one that dies or hangs is a failure of the mutation that it was at."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # From a server without threads: a fork of this process could wait for a lock that another thread held.
    child = forked.fork(_fuzz_here, name, mutations, seed, folder)
    child.join(HANGS_S + mutations)
    ended = "no end" if child.exitcode is None else f"status {child.exitcode}"
    forked.kill(child)
    if (folder / "outcome.json").is_file():
        return Outcome(**json.loads((folder / "outcome.json").read_text()))
    last = (folder / "last.txt").read_text() if (folder / "last.txt").is_file() else "none"
    error = (folder / "error.txt").read_text() if (folder / "error.txt").is_file() else ""
    return Outcome(name, failures=[f"the process ended with {ended} at mutation {last}; see {folder}\n{error}"])


def _fuzz_here(name: str, mutations: int, seed: int, folder: Path) -> None:
    from tests.fuzz_readers import READERS

    os.chdir(folder)
    os.fsync = lambda _: None  # no disk is waited for: nothing here ends the machine
    forked.redirect(folder / "stderr.txt", 2)
    try:
        outcome = fuzz(name, READERS[name], mutations, seed, folder)
    except BaseException:  # reported by the parent
        (folder / "error.txt").write_text(traceback.format_exc())
        raise
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))


def main() -> int:
    """Fuzzes the readers that are named, or all; prints the table of what the mutations ended in."""
    from tests.fuzz_readers import READERS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("readers", nargs="*", default=[])
    parser.add_argument("--mutations", type=int, default=10_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder that keeps the files of failures")
    args = parser.parse_args()
    home = args.keep or Path(tempfile.mkdtemp(prefix="rerankvpr-fuzzing-"))
    outcomes = []
    head = ("reader", "mutations", "values", "skips", "errors", "failures", "seconds", "slowest s", "peak MB")
    print(("{:<18}" + "{:>10}" * 8).format(*head), flush=True)
    for name in args.readers or READERS:
        one = fuzz_in_child(name, args.mutations, args.seed, (home / name).resolve())
        outcomes.append(one)
        counts = (*one.counts.values(), len(one.failures))
        figures = (f"{one.seconds:.1f}", f"{one.slowest_s:.2f}", f"{one.peak_mb:.0f}")
        print(("{:<18}" + "{:>10}" * 8).format(name, *counts, *figures), flush=True)
        for failure in one.failures:
            print(f"  {failure}", flush=True)
    total = sum(one.counts["mutations"] for one in outcomes)
    print(f"{len(outcomes)} readers, {total:,} mutations, {sum(one.seconds for one in outcomes):.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    failed = any(one.failures for one in outcomes)
    if not failed and not args.keep:
        shutil.rmtree(home)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
