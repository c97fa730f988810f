"""What a user types wrong, and what the command answers: one line, what, where, what would be right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from launch import cli
from rerankvpr import PACKAGES
from tests import forked
from tests.networks import backbone
from tests.photos import write_gsv_cities
from tests.training import ForkedRanks

ROOT = Path(__file__).resolve().parent.parent


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command in this process."""
    try:
        status = cli.main(list(argv))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 2
    out, err = capfd.readouterr()
    return status, out, err


@pytest.fixture
def native(tmp_path: Path) -> Path:
    write_gsv_cities(tmp_path / "native", {"Aachen": dict.fromkeys(range(5), 4)})
    return tmp_path / "native"


def test_help_lists_every_verb(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "--help")
    assert status == 0
    assert all(f"rerankvpr {verb}" in out for verb in cli.VERBS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, verb, "--help")
    assert status == 0
    assert "rerankvpr" in out


def test_train_help_documents_every_key(capfd: pytest.CaptureFixture[str]) -> None:
    from configs.schema import Recipe

    _, out, _ = run(capfd, "train", "mini_vits", "--help-all")
    flags = [f"--{key.replace('_', '-')}" for key in Recipe().as_flat()]
    assert [flag for flag in flags if flag not in out] == []


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_help_of_a_recipe_opens_with_what_people_set(
    verb: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from configs.recipe_flags import SET_OFTEN

    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capfd, verb, "mini_vits", "--help")
    assert status == 0
    shown = set(re.findall(r"--([a-z]+(?:\.[a-z.-]+)?) ", out)) - {"help-all"}
    assert {key.replace("_", "-") for key in SET_OFTEN} <= shown
    assert not {"memory.decay-lambda", "engine.zero-stage", "tracking.uri", "eval.rerank.layer", "seed"} & shown
    assert "runs/mini_vits" in out
    assert f"rerankvpr {verb} mini_vits --help-all" in out
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) < 90


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "unknown verb 'trian'; nearest: train"),
        (["shard", "gsv-citys", "a", "b"], "unknown kind of data set 'gsv-citys'; nearest: gsv-cities"),
        (["shard", "gsv-cities", "/nowhere", "out"], "/nowhere"),
        (["verify", "/nowhere"], "/nowhere"),
        (["train"], "train needs a recipe first"),
        (["train", "nowhere"], "recipe nowhere does not exist"),
        (["launch", "train", "mini_vits"], "launch needs `--`"),
        (["eval", "--benchmarks", "town"], "eval needs --checkpoint DIR or --weights FILE"),
        (["eval", "--weights", "/nowhere.pth", "--benchmarks", "town"], "weights file /nowhere.pth does not exist"),
        (["eval", "--checkpoint", "/nowhere", "--benchmarks", "town"], "/nowhere has no manifest.json"),
        (["eval", "--weights", "a", "--checkpoint", "b", "--benchmarks", "town"], "not both"),
    ],
)
def test_mistakes_get_one_line(argv: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capfd, *argv)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("rerankvpr: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in err


def test_unknown_and_impossible_flags_name_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capfd, "train", "mini_vits", "--data.img-size", "224")
    assert status == 2
    assert err == "rerankvpr: unknown flag --data.img-size; nearest: --data.image-size\n"
    status, _, err = run(capfd, "train", "mini_vits", "--data.image-size", "225")
    assert status == 2
    assert err == "rerankvpr: data.image_size: 225 is not a multiple of the patch size 14; nearest: 224 or 238\n"


def test_weights_of_another_size_name_the_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file({k: v.clone() for k, v in backbone("tiny14", "random").state_dict().items()}, path)
    (tmp_path / "town" / "images" / "test").mkdir(parents=True)
    argv = [
        "eval",
        "--weights",
        str(path),
        "--backbone",
        "vits14",
        "--benchmarks",
        "town",
        "--data-root",
        str(tmp_path),
        "--recall-at",
        "1",
    ]
    for part in ("database", "queries"):
        folder = tmp_path / "town" / "images" / "test" / part
        folder.mkdir()
        (folder / "@1@2@.jpg").touch()
    process = forked.run(ROOT, "rerankvpr", *argv)
    assert process.returncode == 2, process.stderr
    assert "does not fit the model" in process.stderr
    assert "cls_token is (1, 1, 128), expected (1, 1, 384)" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_impossible_batches_are_refused_before_training(native: Path, tmp_path: Path) -> None:
    """P not divisible by the ranks, and fewer places than a batch: in real ranks, in one line; launched, and warm."""
    assert cli.main(["shard", "gsv-cities", str(native), str(tmp_path / "set")]) == 0
    recipe = tmp_path / "recipe.yaml"
    content = {
        "output": str(tmp_path / "run"),
        "data": {"shards": str(tmp_path / "set"), "places_per_batch": 5, "image_size": 28},
        "model": {"backbone": "tiny14", "weights": "random"},
        "tracking": {"enabled": False},
    }
    recipe.write_text(yaml.safe_dump(content))
    launched = forked.run(ROOT, "rerankvpr", "launch", "--nproc-per-node", "2", "--", "train", str(recipe), timeout=200)
    few = ForkedRanks(ROOT, 2, "trainer", str(recipe), "--data.places-per-batch", "6")
    said, _ = few.communicate(timeout=200)
    for status, text, words in (
        (launched.returncode, launched.stderr, "data.places_per_batch 5 is not divisible by 2 ranks; nearest: 4 or 6"),
        (few.returncode, said, "5 places are fewer than data.places_per_batch 6"),
    ):
        assert status != 0
        lines = [line for line in text.splitlines() if words in line]
        assert len(lines) == 1, text
        assert "Traceback" not in text, text
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["launch", "trainer"])
def test_a_package_in_front_of_ours_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = f"import sys; sys.path.append({str(ROOT)!r}); from rerankvpr import main; main()"
    process = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert f"package '{name}'" in process.stderr
    assert str(tmp_path / name / "__init__.py") in process.stderr
    assert name in PACKAGES
