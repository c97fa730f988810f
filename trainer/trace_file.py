"""A trace as torch writes it, made readable: ranks and threads by name, memory as a curve, the loader's threads."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.files import replacing
from configs.traced import Span

Event = dict[str, Any]
DEVICES = ("CPU", "GPU")  # by torch's number


def rewrite(raw: Path, path: Path, spans: Sequence[Span], *, rank: int, world_size: int) -> None:
    """Writes the trace of `raw`, with `spans` in it, to `path`, gzipped."""
    trace = json.loads(raw.read_bytes())
    zero_ns = trace.get("baseTimeNanoseconds", 0)
    names = _names(spans, rank=rank, world_size=world_size)
    named = {_key(event) for event in names}  # of two names a viewer takes the first
    events = [
        _memory(event)
        for event in trace["traceEvents"]
        if isinstance(event.get("pid"), int) and not (event["ph"] == "M" and _key(event) in named)
    ]
    trace["traceEvents"] = [*names, *events, *(_event(span, zero_ns) for span in spans)]
    with replacing(path) as partial, gzip.open(partial, "wt", compresslevel=6) as file:
        json.dump(trace, file, separators=(",", ":"))


def _memory(event: Event) -> Event:
    """A mark for each allocation hides what is under it: a point of a curve instead."""
    if event.get("name") != "[memory]":
        return event
    held = event["args"]
    device = DEVICES[held["Device Type"]] if held["Device Type"] < len(DEVICES) else "device"
    args = {"MB": held["Total Allocated"] / 1e6}
    return {"ph": "C", "name": f"memory ({device})", "pid": event["pid"], "ts": event["ts"], "args": args}


def _key(event: Event) -> tuple[str, int, int | None]:
    """What a name or a place in the order is of; a GPU counts as a process of its own."""
    return event["name"], event["pid"], event.get("tid") if event["name"].startswith("thread") else None


def _names(spans: Sequence[Span], *, rank: int, world_size: int) -> list[Event]:
    """What a viewer calls this process and its threads, and their order."""
    process = os.getpid()
    threads = {process: "training"} | {span.thread: span.thread_name for span in spans}
    named = [("process", process, f"rank {rank} of {world_size}", rank)]
    named += [("thread", thread, name, place) for place, (thread, name) in enumerate(threads.items())]
    return [
        {"ph": "M", "name": f"{what}_{key}", "pid": process, "tid": thread, "args": {key: value}}
        for what, thread, name, place in named
        for key, value in (("name", name), ("sort_index", place))
    ]


def _event(span: Span, zero_ns: int) -> Event:
    return {
        **{"ph": "X", "cat": "user_annotation", "name": span.name, "pid": os.getpid(), "tid": span.thread},
        **{"ts": (span.began_ns - zero_ns) / 1e3, "dur": (span.ended_ns - span.began_ns) / 1e3},
    }
