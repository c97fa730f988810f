"""Ctrl-C to real processes at work: one line, no traceback, what is whole stays and the same command resumes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.files import PARTIAL
from configs.schema import Recipe
from launch.cli import VERBS
from tests import forked
from tests.checkpoints import write_checkpoint
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
    assert status == 128 + signal.SIGINT, err
    assert err == "rerankvpr: export: stopped by SIGINT; no export is there in part; the same command begins again\n"
    assert set(workplace.iterdir()) == before


# Every verb, at any moment

COMMANDS = {
    "shard": "shard gsv-cities many_places {new} --shard-mb 1",
    "verify": "verify made/set",
    "inspect": "inspect made/set --out {new}",
    "plan": "plan recipe.yaml",
    "train": "train recipe.yaml --output {new} --tracking.enabled False",
    "launch": "launch --nproc-per-node 2 -- train recipe.yaml --output {new} --tracking.enabled False",
    "submit": "submit --dry-run --nodes 2 --gpus-per-node 1 -- train recipe.yaml --output {new}",
    "doctor": "doctor",
    "eval": "eval --checkpoint made/run --benchmarks folder:many --image-size 28 --recall-at 1 --no-rerank --out {new}",
    "index": "index build many/images/test/database --checkpoint made/run --out {new}",
    "locate": "locate many/images/test/queries --index made/index --json {new}.json",
    "show": "show pca town/images/test/database --model made/run --out {new}.png",
    "report": "report made/results --out {new}.html",
    "serve": "serve --index made/index",
    "sync": "sync made/tracked --uri sqlite:///{new}.db",
    "export": "export made/run {new}.pt2",
    "demo": "demo",
}


@pytest.fixture(scope="module")
def made(workplace: Path) -> Path:
    """What verbs read: a run, a shard set, an index, results, a training that MLflow has not got."""
    made = workplace / "made"
    (workplace / "new").mkdir()
    write_checkpoint(made / "run", Recipe.model_validate({"model": {"backbone": "tiny14", "weights": "random"}}))
    shards = shutil.copytree(workplace / "shards", made / "set")
    assert shards
    town = ("--checkpoint", "made/run", "--image-size", "28", "--no-rerank")
    for words in (
        ("index", "build", "town/images/test/database", "--out", "made/index", *town),
        ("eval", "--benchmarks", "folder:town", "--out", "made/results", "--recall-at", "1", *town),
    ):
        forked.run(workplace, "rerankvpr", *words).check_returncode()
    flags = ("--output", "made/tracked", "--trainer.max-steps", "2", "--eval.benchmarks")
    forked.run(workplace, "rerankvpr", "train", "recipe.yaml", *flags, "--tracking.uri", "http://127.0.0.1:9")
    return made


def test_all_verbs_are_here() -> None:
    assert COMMANDS.keys() == VERBS.keys() - {"rank"}  # which `launch` starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_verb_that_is_asked_to_stop_ends_with_a_line(
    workplace: Path, made: Path, verb: str, number: signal.Signals
) -> None:
    """At two random moments from the one on at which it knows what to do."""
    rng = random.Random(f"{verb} {number}")
    for attempt in range(2):
        command = COMMANDS[verb].format(new=f"new/{verb}-{number}-{attempt}").split()
        process = subprocess.Popen(
            [sys.executable, "-m", "rerankvpr", *command],
            cwd=workplace,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not _catches(process.pid, signal.SIGTERM) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 5))
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
        said = f"{command}, status {process.returncode}:\n{out}\n{err}"
        assert "Traceback" not in out + err, said
        if process.returncode in (0, 75):  # it was done before, or a training has saved
            continue
        assert process.returncode == 128 + number, said
        lines = [line for line in err.splitlines() if line.startswith("rerankvpr: ") and "stopped by" in line]
        assert len(lines) == 1, said
        assert lines[0].startswith(f"rerankvpr: {verb}: stopped by {number.name}"), said
    assert not [path for path in (workplace / "new").rglob("*") if path.name.endswith(PARTIAL)] or verb == "shard"


def _catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
