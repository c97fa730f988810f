"""How the demo ends: its table and its next steps fit a terminal of 80 columns."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.load import load_recipe
from launch import demo

TIMINGS = {"extraction_s_per_image": 0.0085, "retrieval_s_per_query": 0.00005, "rerank_s_per_query": 0.0003}


def evaluation(**more: Any) -> dict[str, Any]:
    result = {"name": "town", "protocol": "25 m", "num_queries": 200, "num_database": 200, "timings": TIMINGS}
    return {**result, "recall": {"1": 91.5, "5": 100.0, "10": 100.0}, **more}


def test_the_table_fits_80_columns() -> None:
    gain = {"1": [4.5, 1.0, 8.0], "5": [0.0, 0.0, 0.0], "10": [-0.5, -1.0, 0.0]}
    reranked = evaluation(recall_reranked={"1": 96.0, "5": 100.0, "10": 99.5}, gain=gain)
    printed = io.StringIO()
    Console(file=printed, width=80).print(demo._table({"before": [evaluation()], "results": [reranked]}))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("trained + re-ranked │" in line for line in lines)
    (gains,) = (line for line in lines if "gain by re-ranking" in line)
    assert [cell.strip() for cell in gains.split("│")[2:5]] == ["+4.5", "+0.0", "-0.5"]
    assert "…" not in printed.getvalue()


def test_what_to_try_next_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    sent = {"uri": "sqlite:///mlflow.db", "run_id": "1" * 32, "experiment_id": "1", "offset": 9, "left": []}
    (tmp_path / "runs" / "demo" / "metrics.sent").write_text(json.dumps(sent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    lines = demo._next_steps(load_recipe(Path("demo")))
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "  http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    commands = [line.split() for line in lines if line.startswith("  ")]
    assert {words[1] for words in commands if words[0] == ".venv/bin/rerankvpr"} == {
        "show",
        "index",
        "locate",
        "shard",
        "train",
    }
