"""Ctrl-C to real processes at work: one line, no traceback, what is whole stays and the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.photos import jpeg, write_gsv_cities
from tests.training import make_workplace

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with shards, more photographs than are encoded or sharded in a moment."""
    folder = tmp_path_factory.mktemp("ctrl_c")
    make_workplace(folder)
    rng = np.random.default_rng(0)
    images = [jpeg(rng) for _ in range(5)]
    for part, count in (("database", 6000), ("queries", 2000)):
        many = folder / "many" / "images" / "test" / part
        many.mkdir(parents=True)
        for i in range(count):
            (many / f"@{500000 + 10 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg").write_bytes(images[i % 5])
    write_gsv_cities(folder / "many_places", {"Aachen": dict.fromkeys(range(3000), 4)})
    return folder


def interrupted(folder: Path, argv: list[str], when: Callable[[], bool]) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command that gets SIGINT once `when` is true; there is no traceback in them."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rerankvpr", *argv],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not when():
        assert process.poll() is None, process.communicate(timeout=10)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in out + err
    return process.returncode, out, err


def test_train_saves_and_says_how_to_resume(workplace: Path) -> None:
    run = workplace / "run"
    flags = ["--trainer.epochs", "300", "--tracking.enabled", "False", "--eval.benchmarks"]
    command = ["train", "recipe.yaml", "--output", "run", *flags]
    status, out, err = interrupted(workplace, command, (run / "checkpoints" / "latest").exists)
    assert (status, err) == (75, "")
    assert f"to resume: rerankvpr {' '.join(command)} --resume" in out
    step = out.split("saved at step ")[1].split()[0]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{int(step):08d}"


def test_eval_keeps_the_features_that_are_whole(workplace: Path) -> None:
    run, features = workplace / "run", workplace / "features"
    if not (run / "checkpoints" / "latest").exists():
        pytest.skip("the training of the test before is not here")
    command = ["eval", "--checkpoint", "run", "--benchmarks", f"folder:{workplace / 'many'}", "--no-rerank"]
    whole: Callable[[], bool] = lambda: len(list(features.rglob("*.safetensors"))) >= 2  # noqa: E731
    status, _, err = interrupted(workplace, [*command, "--features", "features"], whole)
    assert status == 128 + signal.SIGINT
    assert err.count("\n") == 1
    assert "features that are whole stay and the same command resumes" in err


def test_shard_keeps_the_tars_that_are_whole(workplace: Path) -> None:
    command = ["shard", "gsv-cities", "many_places", "set", "--shard-mb", "1"]
    two: Callable[[], bool] = lambda: len(list((workplace / "set").rglob("*.tar"))) >= 2  # noqa: E731
    status, _, err = interrupted(workplace, command, two)
    assert status == 128 + signal.SIGINT
    assert err == "rerankvpr: shard: stopped by SIGINT; tars that are whole stay, the same command resumes\n"


@pytest.mark.parametrize("out", ["net.pt2", "net.onnx"])
def test_export_leaves_nothing_in_part(workplace: Path, out: str) -> None:
    if not (workplace / "run" / "checkpoints" / "latest").exists():
        pytest.skip("the training of the first test is not here")
    before = set(workplace.iterdir())
    at_work: Callable[[], bool] = lambda: any(p.name.startswith(f".{out}") for p in workplace.iterdir())  # noqa: E731
    status, _, err = interrupted(workplace, ["export", "run", out], at_work)
    assert status == 128 + signal.SIGINT
    assert err == "rerankvpr: export: stopped by SIGINT; no export is there in part; the same command begins again\n"
    assert set(workplace.iterdir()) == before
