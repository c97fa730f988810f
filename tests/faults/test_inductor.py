"""A training through torch's inductor on the CPU: real kernels, which a C++ compiler makes in minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compiled_blocks import check_compiled_blocks
from tests.curves import curve
from tests.town_shards import town_recipe

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here"
)


def test_blocks_through_inductor_change_no_number_and_swallow_no_hook() -> None:
    check_compiled_blocks("inductor")


def test_a_training_through_inductor_is_the_eager_one_to_rounding(
    single_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. Tolerance: float32 in another order, which Adam amplifies over the steps."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):  # where DeepSpeed looks
        monkeypatch.setenv(name, value)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def part(name: str, compiled: bool) -> list[list[float]]:
        return curve(tmp_path, name, town_recipe(trainer={"max_steps": 3}, engine={"compile": compiled}))

    eager, compiled = part("eager", compiled=False), part("compiled", compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    np.testing.assert_allclose(compiled, eager, rtol=1e-4)
