"""Traces of steps, as a training writes them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training import finish, one_rank
from trainer.process_group import Rank
from trainer.profile import StepProfile


@pytest.mark.slow
def test_the_steps_that_were_asked_for_are_traced_and_no_others(workplace: Path) -> None:
    flags = ("--trainer.max-steps", "4", "--trainer.profile-steps", "1", "2", "--trainer.validate-every-epochs", "0")
    printed = finish(one_rank(workplace, "profiled", *flags))
    assert "traces of all ranks" in printed
    events = json.loads((workplace / "profiled" / "profile" / "rank-00000.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert names >= {"aten::addmm", "_WithGradient", "Optimizer.step#AdamW.step"}  # network, loss, update
    assert {name for name in names if name.startswith("step ")} == {"step 1", "step 2"}
    held = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    assert max(held) > 1e6  # bytes


def test_a_trace_is_there_if_memory_runs_out(tmp_path: Path) -> None:
    trainer = SimpleNamespace(profile_steps=(0, 5))
    said: list[str] = []
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(trainer=trainer, output=tmp_path), rank=Rank(0, 1, torch.device("cpu")), say=said.append
    )

    def too_large() -> None:
        with StepProfile(context).step(0):
            torch.ones(1000).sum()
            torch.empty(1 << 60)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        too_large()
    events = json.loads((tmp_path / "profile" / "rank-00000.json").read_text())["traceEvents"]
    assert {"aten::sum", "step 0", "[memory]"} <= {event.get("name", "") for event in events}
    assert len(said) == 1
