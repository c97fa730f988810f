"""Home folders in any path, the store that MLFLOW_TRACKING_URI names, names that MLflow takes, FAISS's strings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

import rerankvpr
from configs.flags import parse_flags
from configs.load import RecipeError, load_recipe
from configs.schema import Recipe
from eval.approximate import train_index
from launch.eval_command import main as evaluate
from launch.export_command import main as export
from launch.index_command import BuildCommand
from launch.inspect_command import InspectCommand
from launch.slurm import Resources
from model.network import build_model
from tests.checkpoints import write_checkpoint
from trainer.checkpoint_folder import CheckpointError, drop_lost_best, find_checkpoint
from trainer.engine_state import read_numbers
from trainer.mlflow_sender import is_whole_event
from trainer.mlflow_store import metric_name


def test_home_is_expanded_in_any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    recipe = Recipe.model_validate(
        {
            "output": "~/run",
            "data": {"shards": "~/set", "mix": {"~/other": 0.5}, "cache": "~/cache"},
            "model": {"weights": "~/w.pth"},
            "eval": {"benchmarks": ["folder:~/x:25", "town"], "data_root": "~"},
        }
    )
    assert (recipe.output, recipe.eval.data_root) == (Path("/home/ann/run"), Path("/home/ann"))
    assert recipe.data.shards == "/home/ann/set"
    assert list(recipe.data.mix) == ["/home/ann/other"]
    assert (recipe.data.cache, recipe.model.weights) == (Path("/home/ann/cache"), "/home/ann/w.pth")
    assert recipe.eval.benchmarks == ["folder:/home/ann/x:25", "town"]


def test_the_store_is_the_recipes_else_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert Recipe().tracking.uri == "http://server:5000"
    assert Recipe.model_validate({"tracking": {"uri": "sqlite:///x.db"}}).tracking.uri == "sqlite:///x.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Recipe().tracking.uri == "sqlite:///mlflow.db"


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("train/loss", "train/loss"),
        ("eval/Town (R@1) + x/recall_1", "eval/Town _R_1_ _ x/recall_1"),
        ("../a//b", "a/b"),
        ("/", "_"),
    ],
)
def test_metric_names_are_those_that_mlflow_takes(name: str, taken: str) -> None:
    assert metric_name(name) == taken
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(taken)


def test_an_event_is_sent_only_if_it_is_whole() -> None:
    whole = {"event": "end", "status": "FINISHED", "time_ms": 1}
    assert is_whole_event(whole)
    assert not any(is_whole_event({**whole, **change}) for change in ({"event": []}, {"status": 1}, {"time_ms": None}))


@pytest.mark.parametrize(
    ("factory", "params", "words"),
    [
        ("Foo", "", "could not parse index string Foo$"),
        ("HNSW0", "", "expected such as IVF1024,Flat"),
        ("IVF99999999999,Flat", "", "expected such as"),
        ("Flat\0", "", "expected such as"),
        ("IVF4,Flat", "nprobe=x", "expected NAME=NUMBER"),
    ],
)
def test_faiss_says_what_is_wrong_without_its_source(factory: str, params: str, words: str) -> None:
    rows = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=words) as caught:
        train_index(factory, params, rows)
    assert ".cpp" not in str(caught.value)


def test_few_training_points_print_no_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    for factory in ("IVF16,Flat", "IVF16,PQ4x4", "PQ4x4"):
        train_index(factory, "", rows)
    assert "WARNING" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("text", ["", "step-zzz 50\n", "\0", "step-00000002 50\n"])
def test_a_lost_best_is_told_and_dropped(text: str, tmp_path: Path) -> None:
    (tmp_path / "best").write_text(text)
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(CheckpointError, match="best"):
        find_checkpoint(tmp_path)
    assert "it is removed" in drop_lost_best(tmp_path)
    assert not (tmp_path / "best").exists()
    assert drop_lost_best(tmp_path) == ""


def test_aliases_of_aliases_are_no_recipe(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    assert yaml.safe_load(file.read_text())
    with pytest.raises(RecipeError, match="more than 10000 values") as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("words", [["~/sets", "--out", "~/seen"], ["--out=~/seen", "~/sets"]])
def test_home_is_expanded_in_any_flag(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    command = parse_flags(InspectCommand, words, prog="inspect")
    assert (command.shards, command.out) == ("/home/ann/sets", Path("/home/ann/seen"))


@pytest.mark.parametrize("flag", ["gpus-per-node", "cpus-per-task", "signal-s", "max-requeues", "array"])
def test_a_negative_resource_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag} -1: expected 0 or more"):
        parse_flags(Resources, [f"--{flag}=-1"], prog="submit")


@pytest.mark.parametrize(
    ("command", "words"), [(InspectCommand, ["set"]), (BuildCommand, ["set", "--checkpoint", "c", "--out", "o"])]
)
@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_a_time_to_retry_that_is_no_time_is_refused(command: type, words: list[str], seconds: str) -> None:
    with pytest.raises(ValueError, match=f"--remote-retry-s {seconds}: expected 0 s or more"):
        parse_flags(command, [*words, f"--remote-retry-s={seconds}"], prog="verb")


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 4294967295"):
        Recipe(seed=2**64)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"counts": [], "scaler": 1}', '{"counts": {"step": "x"}, "scaler": {}}', "[" * 9999]
)
def test_the_numbers_of_an_optimizer_are_checked(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, RecursionError)):
        read_numbers(text)


@pytest.mark.parametrize(("key", "name"), [("aggregator", "clss"), ("backbone", "tiny15")])
def test_a_stored_network_of_an_unknown_name_is_a_line_that_names_the_file(key: str, name: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": {"backbone": "tiny14", "weights": "random"}})
    odd = recipe.model_copy(update={"model": recipe.model.model_copy(update={key: name})})
    checkpoint, _ = write_checkpoint(tmp_path / "run", odd, network=build_model(recipe.model))
    run, out = str(tmp_path / "run"), tmp_path / "out.safetensors"
    flags = ["--checkpoint", run, "--benchmarks", "town"]
    for use in (lambda: rerankvpr.load(run), lambda: export([run, str(out)]), lambda: evaluate(flags)):
        with pytest.raises(
            RecipeError, match=rf"^{checkpoint / 'recipe.yaml'}: unknown model.{key} '{name}'; nearest: "
        ):
            use()
    assert not out.exists()
