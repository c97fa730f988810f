"""A watchdog for each rank: when a job stands still, the rank and the section that stalled are named and the job ends.

A rank that waits in a collective looks as stuck as the one it waits for. So every rank's watchdog thread publishes
where its training thread is, in a store that needs no collective; when its own has not moved for too long, it reads
all the others: one that publishes no more is stopped or gone, else the one furthest behind is to blame. A rank that
is asked to stop while it waits for one that is gone would wait until a launcher kills it: it ends at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from configs.ranks import barrier
from trainer import flight_recorder

# In the order of a step.
SECTIONS = ("start", "compose", "data", "forward", "loss", "step", "save", "evaluation", "end")
LONG_SECTIONS = ("compose", "evaluation")  # that the first limit holds for
STALLED_STATUS = 74  # EX_IOERR of sysexits.h: something outside the program gave no answer
OTHERS_WAIT_S = 3.0
RECORDS_S = 1.5  # for the other ranks' records, while these wait
PATIENCE_S = 10.0  # with the store

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """Where a rank's training thread is."""

    step: int
    section: str
    beat: int  # grows each time the rank publishes
    held_s: float  # seconds in this section, or since its last sign of progress
    host: str

    @property
    def order(self) -> tuple[int, int]:
        """Sorts ranks by how far they have come."""
        return self.step, SECTIONS.index(self.section)


def culprit(before: Mapping[int, Position], after: Mapping[int, Position], world_size: int) -> tuple[int, str]:
    """The rank to blame for a standstill, and a line on it, from two readings of what the ranks published.

    A rank that is missing or whose `beat` did not move is silent: stopped or gone. Otherwise the one furthest behind.
    """
    if silent := silent_ranks(before, after, world_size):
        rank = silent[0]
        more = f" (silent too: {', '.join(map(str, silent[1:9]))})" if len(silent) > 1 else ""
        if rank not in after:
            return rank, f"rank {rank} does not answer: its process is stopped, or its node is gone{more}"
        last = after[rank]
        return rank, (
            f"rank {rank} on {last.host} is silent: its process is stopped, or its node is gone; last heard of in "
            f"section {last.section} of step {last.step}{more}"
        )
    rank = min(after, key=lambda r: after[r].order)
    last = after[rank]
    waiting = sum(position.order > last.order for position in after.values())
    return rank, (
        f"rank {rank} on {last.host} is in section {last.section} of step {last.step} since {last.held_s:.0f} s; "
        f"{waiting} rank(s) wait for it"
    )


def silent_ranks(before: Mapping[int, Position], after: Mapping[int, Position], world_size: int) -> list[int]:
    """Ranks that are missing, or published nothing between the two readings."""
    return [r for r in range(world_size) if r not in after or (r in before and before[r].beat == after[r].beat)]


class Watchdog:
    """Watches this rank's training thread, which says where it is by `enter` and `alive`; a context manager."""

    def __init__(
        self,
        *,
        limit_s: float,
        first_limit_s: float,
        folder: Path,
        asked_to_stop: Callable[[], str] = str,
        setting: str = "engine.stall_s",
        remedy: str = "--resume continues from the last checkpoint",
    ) -> None:
        """`limit_s` is how long a section may last without a sign of progress (0: for ever); `first_limit_s`, if more,
        holds for LONG_SECTIONS and until a second step. Stack traces go to `folder`. `asked_to_stop` names the signal
        that asked for it, if one has, and is called in a thread. `setting` is what `limit_s` is called where it is set,
        `remedy` what to do after the end, for its line. Every rank must call this."""
        self._asked_to_stop, self._setting, self._remedy = asked_to_stop, setting, remedy
        self.limit_s, self.first_limit_s, self.folder = limit_s, max(limit_s, first_limit_s), folder
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.beat_s = min(5.0, limit_s / 10)
        self._where = (0, "start", time.monotonic())
        self._first_step: int | None = None
        self._warm = False
        self._beat = 0
        self._ended, self._began = threading.Event(), time.time()
        self._thread: threading.Thread | None = None
        if limit_s:
            self._store = _open_store()
            self._publish()
            barrier()  # all have published once

    def __enter__(self) -> Watchdog:
        if self.limit_s:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def enter(self, section: str, step: int) -> None:
        """The training thread begins a section of a step."""
        if section == "data":
            self._first_step = step if self._first_step is None else self._first_step
            self._warm = step > self._first_step
        self._where = (step, section, time.monotonic())

    def alive(self) -> None:
        """The training thread has come on within a long section, such as an evaluation."""
        step, section, _ = self._where
        self._where = (step, section, time.monotonic())

    def _position(self) -> Position:
        step, section, since = self._where
        return Position(step, section, self._beat, time.monotonic() - since, socket.gethostname())

    def _publish(self) -> None:
        self._beat += 1
        self._store.set(str(self.rank), json.dumps(asdict(self._position())))

    def _read(self) -> dict[int, Position]:
        texts = self._store.multi_get([str(rank) for rank in range(self.world_size)])
        return {rank: Position(**json.loads(text)) for rank, text in enumerate(texts)}

    def _limit_s(self) -> float:
        return self.limit_s if self._warm and self._where[1] not in LONG_SECTIONS else self.first_limit_s

    def _watch(self) -> None:
        while not self._ended.wait(self.beat_s):
            held_s = self._position().held_s
            stalled = held_s > self._limit_s()
            asked = self._asked_to_stop() if held_s > self.beat_s else ""
            gone = False
            try:
                self._ask(self._publish)
                if not (stalled or asked):
                    continue
                before = self._ask(self._read)
                for _ in range(3):  # published at each beat meanwhile: others may read at the same time
                    if self._ended.wait(self.beat_s):
                        return
                    self._ask(self._publish)
                after = self._ask(self._read)
                blame = culprit(before, after, self.world_size)
                gone = bool(silent_ranks(before, after, self.world_size))
            except (TimeoutError, RuntimeError):  # a store that hangs, or that is gone (DistError)
                if not (stalled or asked):
                    continue
                gone = True
                why = "its process is stopped, or its node is gone"
                blame = 0, f"rank 0, which keeps the ranks' positions, does not answer: {why}"
            if self._position().held_s > held_s and (stalled or gone):  # has not moved meanwhile
                self._end(*blame, asked="" if stalled else asked)

    def _ask(self, call: Callable[[], T]) -> T:
        """A call that may hang, as one to a store whose server is stopped; TimeoutError then."""
        answers: list[T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                answers.append(call())
            except (RuntimeError, OSError) as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="watchdog store", daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if errors:
            raise errors[0]
        if not answers:
            raise TimeoutError
        return answers[0]

    def _end(self, rank: int, text: str, *, asked: str) -> None:
        """Writes down what this rank's threads were doing, has one rank speak, and ends the process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"stalled-rank-{self.rank:05d}.txt").open("w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            pass
        self._dump()
        if self.rank == (1 if rank == 0 and self.world_size > 1 else 0):
            why = f"{asked} came, and nothing can be saved" if asked else f"{self._setting} {self.limit_s:g}"
            print(
                f"rerankvpr: {text}; the job ends ({why}); stack traces are in {self.folder}/stalled-rank-*.txt; "
                f"{self._remedy}",
                file=sys.stderr,
                flush=True,
            )
            if recorded := self._recorded():
                print(f"rerankvpr: flight recorder: {recorded}", file=sys.stderr, flush=True)
        else:
            time.sleep(OTHERS_WAIT_S)  # a launcher ends the others as soon as one has ended
        os._exit(STALLED_STATUS)

    def _dump(self) -> None:
        """Leaves this rank's record of collective operations beside its stack traces, if torch gives it."""
        with contextlib.suppress(TimeoutError, RuntimeError, OSError):
            self._ask(lambda: flight_recorder.dump(self.folder, self.rank))

    def _recorded(self) -> str:
        """What the records say that ranks have left by now; others are given a moment, not a stopped one."""
        deadline = time.monotonic() + RECORDS_S
        while time.monotonic() < deadline:
            if len(flight_recorder.collected(self.folder, since=self._began)) == self.world_size:
                break
            time.sleep(0.1)
        return flight_recorder.report(self.folder, since=self._began)


def _open_store() -> dist.Store:
    """A store that rank 0 keeps in its own process, for the watchdogs alone."""
    host, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=PATIENCE_S)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    port = torch.zeros(1, dtype=torch.int64, device=device)
    store = None
    if dist.get_rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port += store.port
    dist.broadcast(port, src=0)
    return store or dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=patience)
