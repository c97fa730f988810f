"""Frozen real weights on real photographs, by the command, on two ranks: the known recalls within one query."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

photographs = pytest.mark.skipif(
    not (os.environ.get("RERANKVPR_TEST_DATA") and os.environ.get("RERANKVPR_TEST_WEIGHTS")),
    reason="RERANKVPR_TEST_DATA and RERANKVPR_TEST_WEIGHTS are not set: no real photographs or weights",
)


def evaluate(out: Path, *flags: str) -> dict[str, Any]:
    """The command's result for day_right -> night_right on two ranks."""
    command = [
        *(sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", "2", "--", "eval"),
        *("--weights", os.environ["RERANKVPR_TEST_WEIGHTS"], "--data-root", os.environ["RERANKVPR_TEST_DATA"]),
        *("--benchmarks", "gardens_point/day_right/night_right", "--out", str(out), *flags),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((out / "results.json").read_text())["results"]
    assert list(result["recall"].values()) == pytest.approx([22.0, 46.5, 57.0], abs=0.51)
    return dict(result)


@photographs
def test_frozen_weights_reach_the_known_recalls_on_gardens_point(tmp_path: Path) -> None:
    """Known figures of these frozen weights; one query is 0.5 points.

    With timm's rule for the position table, and timm alone, they are 20.0, 45.5, 56.5, and 46.5, 64.5, 69.5 re-ranked.
    """
    plain = (
        "--rerank.saliency-thresh",
        "None",
        "--rerank.geometry",
        "none",
        "--rerank.global-weight",
        "0",
        "--rerank.top-k",
        "20",
        "--pictures",
        "2",
    )
    result = evaluate(tmp_path, *plain)
    assert result["protocol"] == "+-2 frames, frames 0-199"
    assert list(result["recall_reranked"].values()) == pytest.approx([52.5, 68.0, 71.5], abs=0.51)
    assert all(seconds > 0 for seconds in result["timings"].values())
    assert len(list(tmp_path.glob("pictures/**/*.png"))) == 2


@photographs
def test_defaults_gain_35_points_and_int8_keeps_them_below_100_kb_an_image(tmp_path: Path) -> None:
    """Matching by the defaults, and in int8; the sweep draws its heat map on the way."""
    result = evaluate(tmp_path / "defaults", "--pictures", "0")
    assert result["gain"]["1"][0] >= 35
    assert min(gain for gain, _, _ in result["gain"].values()) >= 0
    small = ("--rerank.dtype", "int8", "--sweep", "True")
    compact = evaluate(tmp_path / "compact", "--pictures", "0", *small)
    assert compact["kb_local_per_image"] < 100 < result["kb_local_per_image"]
    assert compact["recall_reranked"]["1"] >= result["recall_reranked"]["1"] - 1
    assert list((tmp_path / "compact").glob("sweeps/**/*.png"))
