"""Frozen real weights on real photographs, by the command, on two ranks: the known recalls within one query."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not (os.environ.get("RERANKVPR_TEST_DATA") and os.environ.get("RERANKVPR_TEST_WEIGHTS")),
    reason="RERANKVPR_TEST_DATA and RERANKVPR_TEST_WEIGHTS are not set: no real photographs or weights",
)
def test_frozen_weights_reach_the_known_recalls_on_gardens_point(tmp_path: Path) -> None:
    """Figures of the same frozen weights and protocol computed with timm alone; one query is 0.5 points."""
    command = [
        *(sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", "2", "--", "eval"),
        *("--weights", os.environ["RERANKVPR_TEST_WEIGHTS"], "--data-root", os.environ["RERANKVPR_TEST_DATA"]),
        *("--benchmarks", "gardens_point/day_right/night_right", "--rerank.saliency-thresh", "None"),
        *("--pictures", "2", "--out", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["protocol"] == "+-2 frames, frames 0-199"
    assert list(result["recall"].values()) == pytest.approx([20.0, 45.5, 56.5], abs=0.51)
    assert list(result["recall_reranked"].values()) == pytest.approx([46.5, 64.5, 69.5], abs=0.51)
    assert all(seconds > 0 for seconds in result["timings"].values())
    assert len(list(tmp_path.glob("pictures/**/*.png"))) == 2
