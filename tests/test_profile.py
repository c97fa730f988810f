"""Traces of steps, as a training writes them."""

import gzip
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer.profile
from configs.traced import beside, part, spans
from tests.training import finish, one_rank
from trainer.process_group import Rank
from trainer.profile import StepProfile, waits_told
from trainer.trace_file import rewrite

PARTS = ["augment", "forward", "loss", "gather descriptors", "backward", "optimizer", "enqueue", "read the figures"]


def events_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The events of a trace that a run left in its output folder, in the order of time."""
    with gzip.open(folder / "profile" / f"rank-{rank:05d}.json.gz", "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return sorted(events, key=lambda event: event.get("ts", 0.0))


def profile_of(
    folder: Path, steps: tuple[int, int], said: list[str], rank: int = 0, world_size: int = 1
) -> StepProfile:
    """A rank's profile, without a training."""
    recipe = SimpleNamespace(trainer=SimpleNamespace(profile_steps=steps), output=folder)
    context: Any = SimpleNamespace(recipe=recipe, rank=Rank(rank, world_size, torch.device("cpu")), say=said.append)
    return StepProfile(context)


@pytest.mark.slow
def test_the_steps_that_were_asked_for_are_traced_and_no_others(workplace: Path) -> None:
    flags = ("--trainer.max-steps", "4", "--trainer.profile-steps", "1", "2", "--trainer.validate-every-epochs", "0")
    flags = (*flags, "--memory.start-epoch", "0")
    printed = finish(one_rank(workplace, "profiled", *flags))
    assert "traces of all ranks" in printed
    events = events_of(workplace / "profiled")
    names = {event["name"] for event in events}
    assert names >= {"aten::addmm", "_WithGradient", "Optimizer.step#AdamW.step"}  # network, loss, update
    assert names >= {"wait for data", "log"}
    steps = [event for event in events if event["name"].startswith("step ")]
    assert [event["name"] for event in steps] == ["step 1", "step 2"]
    for step in steps:
        end = step["ts"] + step["dur"]
        inside = [event["name"] for event in events if event.get("ph") == "X" and step["ts"] < event["ts"] < end]
        parts = [name for name in inside if name in PARTS]
        assert list(dict.fromkeys(parts)) == PARTS
    assert max(event["args"]["MB"] for event in events if event["ph"] == "C") > 1


def test_a_trace_names_ranks_threads_and_parts_and_has_memory_as_a_curve(tmp_path: Path) -> None:
    said: list[str] = []
    profile = profile_of(tmp_path, (1, 2), said, rank=3, world_size=4)

    def load() -> None:
        with beside("decode a place"):
            torch.ones(10).sum()

    for number in range(4):
        with profile.step(number), part("forward"):
            held = torch.ones(1_000_000)
            loader = threading.Thread(target=load, name="decode_0")
            loader.start()
            loader.join()
            del held
    events = events_of(tmp_path, rank=3)
    steps = {event["name"]: event for event in events if event["name"].startswith("step ")}
    assert list(steps) == ["step 1", "step 2"]
    inside = [event for event in events if event["name"] in ("forward", "decode a place")]
    assert [event["name"] for event in inside] == ["forward", "decode a place"] * 2
    for step, (forward, decode) in zip(steps.values(), (inside[:2], inside[2:]), strict=True):
        assert step["ts"] <= forward["ts"] < decode["ts"]
        assert decode["ts"] + decode["dur"] < forward["ts"] + forward["dur"]
        assert step["tid"] == forward["tid"] != decode["tid"]
    named = {(event["name"], event["tid"]): event["args"] for event in events if event["ph"] == "M"}
    process = inside[0]["pid"]
    assert [args["name"] for (key, _), args in named.items() if key == "process_name"] == ["rank 3 of 4"]
    assert named["process_sort_index", process] == {"sort_index": 3}
    assert named["thread_name", process] == {"name": "training"}
    assert named["thread_name", inside[1]["tid"]] == {"name": "decode_0"}
    curve = [event["args"]["MB"] for event in events if event["ph"] == "C" and event["name"] == "memory (CPU)"]
    assert max(curve) == pytest.approx(4, abs=0.1)  # a million numbers of 4 bytes
    assert curve[-1] < 0.1
    assert not list((tmp_path / "profile").glob(".*"))


def test_a_gpu_keeps_its_name_and_has_a_curve_of_its_own(tmp_path: Path) -> None:
    held = {"Device Type": 1, "Device Id": 0, "Total Allocated": 5_000_000, "Bytes": 5_000_000}
    events = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "python"}},
        {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "args": {"labels": "GPU 0"}},
        {"ph": "M", "name": "process_name", "pid": os.getpid(), "tid": 0, "args": {"name": "python"}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 1.0, "dur": 2.0},
        {"ph": "i", "name": "[memory]", "pid": os.getpid(), "tid": 1, "ts": 1.5, "args": held},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "x", "ts": 0.0, "dur": 9.0},
    ]
    raw, path = tmp_path / "raw.json", tmp_path / "profile" / "rank-00000.json.gz"
    path.parent.mkdir()
    raw.write_text(json.dumps({"traceEvents": events}))
    rewrite(raw, path, [], rank=0, world_size=1)
    found = events_of(tmp_path)
    assert [event for event in found if event["pid"] == 0] == [*events[:2], events[3]]
    assert events[2] not in found
    assert [event["args"] for event in found if event["name"] == "memory (GPU)"] == [{"MB": 5.0}]
    assert "PyTorch Profiler (0)" not in {event["name"] for event in found}


def test_names_and_threads_are_kept_for_a_trace_alone() -> None:
    spans.clear()
    with part("forward"), beside("decode a place"):
        pass
    assert not spans


def test_a_trace_is_there_if_memory_runs_out(tmp_path: Path) -> None:
    said: list[str] = []

    def too_large() -> None:
        with profile_of(tmp_path, (0, 5), said).step(0):
            torch.ones(1000).sum()
            torch.empty(1 << 60)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        too_large()
    assert {"aten::sum", "step 0", "memory (CPU)"} <= {event["name"] for event in events_of(tmp_path)}
    assert len(said) == 1


@pytest.mark.parametrize("error", [MemoryError(), json.JSONDecodeError("Invalid control character", "", 0)])
def test_torch_s_own_file_is_there_if_it_cannot_be_rewritten(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trainer.profile, "rewrite", refuse)
    said: list[str] = []
    with profile_of(tmp_path, (0, 0), said).step(0):
        torch.ones(10).sum()
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank-00000.json"]
    assert "rank-00000.json is as torch wrote it, without the loader's threads" in said[0]
    assert "step 0" in (tmp_path / "profile" / "rank-00000.json").read_text()


def test_torch_tells_of_waits_on_a_gpu_alone_and_no_longer_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits_told("warn", torch.device("cpu")), waits_told("off", torch.device("cuda")):
        pass
    assert not modes
    with pytest.raises(KeyError), waits_told("error", torch.device("cuda")):
        raise KeyError
    assert modes == ["error", "default"]
