"""Runs of `shard tars` in processes of their own: killed at random moments, or watched for their memory."""

from __future__ import annotations

import random
import time
from pathlib import Path

from data_pipeline.shards import write_shards
from data_pipeline.sources.tars import Reading, finish, read_tars
from tests import forked
from tests.archives import SMALL, Sets, of_set


def shard(sets: Sets, words: list[str], out: Path, by: str, spill_bytes: int) -> None:
    """A whole run."""
    how = Reading(by, spill_bytes=spill_bytes)  # type: ignore[arg-type]
    write_shards(read_tars(words, sets.table, out, how, say=lambda text: None), out, SMALL)
    finish(out)


def check_killed_at(
    sets: Sets, words: list[str], folder: Path, expected: dict[str, bytes], moments: int, by: str, seed: int = 0
) -> None:
    """Kills one run so many times, each from where the last one was killed, then finishes it; `expected` comes out.

    Moments are spread over the time that an unbroken run takes.
    """
    took = 0.0
    for name in ("warm", "whole"):  # the first one waits for the server that it is forked from
        began = time.monotonic()
        whole = forked.fork(shard, sets, words, folder / name, by, 2**20)
        whole.join()
        took = time.monotonic() - began
        assert whole.exitcode == 0
    draw, killed = random.Random(seed), 0
    for moment in range(moments):
        out = folder / f"killed-{moment}"
        process = forked.fork(shard, sets, words, out, by, 2**20)
        process.join(0.9 * took * (moment + draw.random()) / moments)
        killed += process.is_alive()
        forked.kill(process)
        second = forked.fork(shard, sets, words, out, by, 2**20)
        second.join(draw.uniform(0, took))
        forked.kill(second)
        shard(sets, words, out, by, 2**20)
        assert of_set(out) == expected, f"killed run {moment}, by {by}"
    assert killed >= moments // 2


def peak_mb(sets: Sets, out: Path, by: str, spill_bytes: int) -> float:
    """Peak resident memory of a run."""
    said = out.with_suffix(".peak")
    process = forked.fork(_peak, sets, out, by, spill_bytes, said)
    process.join()
    assert process.exitcode == 0
    return float(said.read_text())


def _peak(sets: Sets, out: Path, by: str, spill_bytes: int, said: Path) -> None:
    shard(sets, [str(sets.archives)], out, by, spill_bytes)
    lines = Path("/proc/self/status").read_text().splitlines()
    said.write_text(next(str(float(line.split()[1]) / 1024) for line in lines if line.startswith("VmHWM")))
