"""Traces of steps, as a training writes them."""

import json
from pathlib import Path

import pytest

from tests.training import finish, one_rank


@pytest.mark.slow
def test_the_steps_that_were_asked_for_are_traced_and_no_others(workplace: Path) -> None:
    flags = ("--trainer.max-steps", "4", "--trainer.profile-steps", "1", "2", "--trainer.validate-every-epochs", "0")
    printed = finish(one_rank(workplace, "profiled", *flags))
    assert "traces of all ranks" in printed
    events = json.loads((workplace / "profiled" / "profile" / "rank-00000.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert names >= {"aten::addmm", "_WithGradient", "Optimizer.step#AdamW.step"}  # network, loss, update
    assert {name for name in names if name.startswith("step ")} == {"step 1", "step 2"}
