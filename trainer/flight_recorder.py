"""torch's flight recorder: the last collective operations of each rank, written when a job stands still, and who is
behind in them.

torch records what each process group was asked for, of NCCL and of gloo, and whether it is done. A dump is a pickle of
plain values in torch's own format (FlightRecorder.hpp, version 2.x), a file per rank, which `python -m
torch.distributed.flight_recorder.fr_trace FOLDER -p flight-recorder-rank-` reads too.
"""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "flight-recorder-rank-"
ENTRIES = "2000"  # operations that a rank remembers: some hundred steps at ZeRO 1, some ten at 3
WHOLE = "default_pg"  # what torch calls the group of all ranks
NAMED = 8  # ranks in a line


def settings() -> dict[str, str]:
    """The variable that switches the recorder on; none if the user has set it by the name that it had before torch 2.9.

    A collective of NCCL that times out leaves a dump unless TORCH_NCCL_DUMP_ON_TIMEOUT is 0.
    """
    return {} if "TORCH_NCCL_TRACE_BUFFER_SIZE" in os.environ else {"TORCH_FR_BUFFER_SIZE": ENTRIES}


def switch_on(folder: Path) -> None:
    """Has a collective of NCCL that times out leave its dump in `folder`; for what is set already, that stays.

    Call it before a process group is made.
    """
    file = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder.resolve() / PREFIX)}
    for name, value in (settings() | file).items():
        os.environ.setdefault(name, value)


def dump(folder: Path, rank: int) -> None:
    """Writes what this rank's recorder holds to a file in `folder`, without stack traces, which the watchdog writes.

    Raises OSError, or RuntimeError where this torch has no recorder for the backend.
    """
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    if not hasattr(c10d, name):
        raise RuntimeError(f"this torch has no {name}")
    file = folder / f"{PREFIX}{rank}"
    part = file.with_suffix(".part")
    part.write_bytes(getattr(c10d, name)(includeStackTraces=False))
    part.replace(file)


@dataclass(frozen=True)
class Call:
    """A collective operation as a rank recorded it."""

    name: str
    sizes: str  # of its inputs
    done: bool

    def __str__(self) -> str:
        return f"{self.name} {self.sizes}"


@dataclass(frozen=True)
class Record:
    """What a rank recorded: operations by group and number, and who is in each group."""

    calls: Mapping[str, Mapping[int, Call]]
    ranks: Mapping[str, tuple[int, ...]]  # gloo records those of the whole group alone, under no name
    described: Mapping[str, str]

    def members(self, group: str) -> tuple[int, ...]:
        """The ranks of a group, as far as they are recorded."""
        return self.ranks.get(group, self.ranks.get("", ()) if self.described.get(group) == WHOLE else ())


class _PlainValues(pickle.Unpickler):
    """A pickle of numbers, texts, lists and dicts; any other names a function to be called, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is in no dump of the flight recorder")


def read(file: Path) -> Record:
    """A dump. Raises ValueError naming the file for anything else."""
    try:
        with file.open("rb") as stream:
            found = _PlainValues(stream).load()
        if str(found["version"]).partition(".")[0] != "2":
            raise ValueError(f"version {found['version']}, expected 2.x")
        ranks = {str(one["name"]): _ranks_in(str(one["ranks"])) for one in found["pg_config"].values()}
        calls: dict[str, dict[int, Call]] = {}
        described: dict[str, str] = {}
        for entry in found["entries"]:
            group, described_as = (str(part) for part in entry["process_group"])
            described[group] = described_as if described_as != "undefined" else group
            backend, _, name = str(entry["profiling_name"]).rpartition(":")
            # gloo says of an operation that it is retired when it is done, and no more; NCCL retires what timed out.
            done = entry["state"] == "completed" or (backend == "gloo" and bool(entry["retired"]))
            if not entry.get("is_p2p"):
                call = Call(name, str(entry["input_sizes"]), done)
                calls.setdefault(group, {})[int(entry["collective_seq_id"])] = call
        return Record(calls, ranks, described)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file}: no dump of torch's flight recorder ({type(error).__name__}: {error})") from error


def _ranks_in(text: str) -> tuple[int, ...]:
    """Ranks from a text such as [0, 1]."""
    return tuple(int(rank) for rank in ast.literal_eval(text))


def collected(folder: Path, *, since: float = 0.0) -> dict[int, Record]:
    """The dumps in a folder by rank, written after `since` (seconds of the clock); what is no dump is left out."""
    found = {}
    for file in sorted(folder.glob(f"{PREFIX}*")):
        number = file.name.removeprefix(PREFIX)
        try:
            if number.isdecimal() and file.stat().st_mtime >= since:
                found[int(number)] = read(file)
        except (OSError, ValueError):
            continue
    return found


def blame(records: Mapping[int, Record]) -> tuple[tuple[int, ...], str]:
    """The ranks that others wait for, and a line on it; no rank and an empty line if nobody waits.

    In each group the first operation that is not done somewhere counts. Ranks that have not begun it are behind; else
    those that began another one than most; else those that left no record; else it is begun everywhere and hangs. If
    operations of several groups are not done, the line is on the one that says most.
    """
    found: list[tuple[int, tuple[int, ...], str]] = []
    for group in sorted({name for record in records.values() for name in record.calls}):
        members = {rank for record in records.values() for rank in record.members(group)}
        members |= {rank for rank, record in records.items() if group in record.calls}
        calls = {rank: records[rank].calls.get(group, {}) for rank in sorted(members & set(records))}
        open_calls = [number for of_rank in calls.values() for number, call in of_rank.items() if not call.done]
        if not open_calls:
            continue
        number = min(open_calls)
        begun = {rank: of_rank[number] for rank, of_rank in calls.items() if number in of_rank}
        name = next(record.described[group] for record in records.values() if group in record.described)
        behind = [rank for rank, of_rank in calls.items() if max(of_rank, default=0) < number]
        found.append(_told(f"{{}} of group {name}, number {number}", begun, behind, sorted(members - set(records))))
    return min(found, key=lambda one: one[0])[1:] if found else ((), "")


def _told(
    operation: str, begun: Mapping[int, Call], behind: list[int], absent: list[int]
) -> tuple[int, tuple[int, ...], str]:
    """Of an operation that is not done: how little that says (0 to 3), who is to blame, and the line."""
    usual = max(begun.values(), key=lambda call: [str(one) for one in begun.values()].count(str(call)))
    what = operation.format(usual)
    others = [rank for rank, call in begun.items() if str(call) != str(usual)]
    no_record = f"; {_ranks(absent)} left no record" if absent else ""
    waiting = f"{_ranks(sorted(begun))} wait{'s' if len(begun) == 1 else ''}"
    if behind:
        have = "has" if len(behind) == 1 else "have"
        return 0, tuple(behind), f"{_ranks(behind)} {have} not begun {what}, in which {waiting}{no_record}"
    if others:
        given = operation.format(begun[others[0]])
        usually = _ranks([rank for rank in begun if rank not in others])
        return 1, tuple(others), f"{_ranks(others)} began {given}, where {usually} began {usual}{no_record}"
    if absent:
        return 2, tuple(absent), f"{_ranks(absent)} left no record; {waiting} in {what}"
    return 3, (), f"all ranks have begun {what}, and it does not end: look at links and GPUs"


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"


def report(folder: Path, *, since: float = 0.0) -> str:
    """The line of `blame` on the dumps in a folder that were written after `since`; empty if nobody waits."""
    return blame(collected(folder, since=since))[1]
