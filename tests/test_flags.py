"""From the words of a command line to recipes and commands: every key is a flag, every mistake one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from configs.flags import FlagError, parse_flags, parse_known_flags
from configs.foreign import FOREIGN
from configs.load import RECIPES, load_recipe
from configs.recipe_flags import parse_over_recipe
from configs.schema import Recipe, RerankConfig
from launch.export_command import ExportCommand
from trainer.command import TrainCommand


def words_of(key: str, value: Any) -> list[str]:
    """The words that set a key to a value."""
    section, dot, name = key.replace("_", "-").rpartition(".")
    match value:
        case bool():
            return [f"--{section}{dot}{'' if value else 'no-'}{name}"]
        case list():
            values = [str(one) for one in value]
        case dict():
            values = [str(one) for pair in value.items() for one in pair]
        case _:
            values = [str(value)]
    return [f"--{section}{dot}{name}", *values]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_is_a_flag_whatever_the_recipe_holds(path: Path) -> None:
    """All keys of one recipe, given over another, give the one; mappings and lists that are empty are emptied."""
    full = load_recipe(Path("gsv_cities_vitl")).model_copy(deep=True)
    rich = {"repeat": {"London": 2, "Paris": 3}, "mix": {"other": 0.5}}
    full = full.model_copy(update={"data": full.data.model_copy(update=rich)})
    for wanted in (Recipe(), full):
        words = [word for key, value in wanted.as_flat().items() for word in words_of(key, value)]
        assert parse_flags(Recipe, words, prog="train", default=load_recipe(path)) == wanted
        assert parse_flags(Recipe, words, prog="train", default=full) == wanted


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data.img-size", "224"], "unknown flag --data.img-size; nearest: --data.image-size"),
        (["--seed", "x"], "--seed: 'x' is not a whole number"),
        (["--optim.lr", "x"], "--optim.lr: 'x' is not a number"),
        (["--model.backbone", "vits15"], "model.backbone: 'vits15' is not one of vits14, .*; nearest: vits14"),
        (["--data.places-per-batch", "0"], "data.places_per_batch: input should be greater than or equal to 1, got 0"),
        (["--loss.args", "alpha"], "--loss.args: expected pairs of KEY VALUE, got alpha"),
        (["--data.repeat", "London", "x"], "data.repeat.London: input should be a valid integer.* got 'x'"),
        (["--engine.zero-stage", "0", "--engine.precision", "bf16"], "engine: bf16 at zero_stage 0"),
        (["--eval.rerank.store", "int8"], "--eval.rerank.store has another name: write --eval.rerank.dtype"),
        (["--dry-run"], "unknown flag --dry-run; `rerankvpr plan RECIPE`"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["again"], "'again' belongs to no flag"),
        (["--resume", "a", "b"], "--resume: expected at most one folder, got a b"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(FlagError, match=line) as caught:
        parse_over_recipe(TrainCommand, ["demo", *words], verb="train")
    assert len(str(caught.value).splitlines()) == 1


def test_switches_look_the_same_everywhere() -> None:
    assert parse_flags(Recipe, ["--engine.compile", "--tracking.no-enabled"], prog="x").engine.compile
    assert not parse_flags(Recipe, ["--tracking.no_enabled"], prog="x").tracking.enabled
    # As scripts may write them; a value that is no switch's is left alone.
    old = parse_flags(Recipe, ["--tracking.enabled", "False", "--engine.compile", "True", "--name", "True"], prog="x")
    assert (old.tracking.enabled, old.engine.compile, old.name) == (False, True, "True")


def test_a_mapping_that_is_given_replaces_the_recipes() -> None:
    command, notes = parse_over_recipe(TrainCommand, ["gsv_cities_vitl", "--loss.args", "alpha", "3"], verb="train")
    assert command.recipe.loss.args == {"alpha": 3}
    assert not notes
    command, _ = parse_over_recipe(TrainCommand, ["gsv_cities_vitl", "--loss.args"], verb="train")
    assert command.recipe.loss.args == {}


def test_another_loss_drops_the_old_ones_arguments_aloud() -> None:
    change = ["gsv_cities_vitl", "--loss.name", "TripletMarginLoss"]
    command, notes = parse_over_recipe(TrainCommand, change, verb="train")
    assert (command.recipe.loss.name, command.recipe.loss.args) == ("TripletMarginLoss", {})
    (note,) = notes
    assert "alpha 2.0, beta 50.0, base 0.5" in note
    command, notes = parse_over_recipe(TrainCommand, [*change, "--loss.args", "margin", "0.1"], verb="train")
    assert (command.recipe.loss.args, notes) == ({"margin": 0.1}, [])
    same = [
        "--loss.args",
        "alpha",
        "2.0",
        "beta",
        "50.0",
        "base",
        "0.5",
    ]  # the loss will refuse them
    command, notes = parse_over_recipe(TrainCommand, [*change, *same], verb="train")
    assert (command.recipe.loss.args, notes) == ({"alpha": 2.0, "beta": 50.0, "base": 0.5}, [])


@pytest.mark.parametrize(
    ("words", "resume", "checkpoint"),
    [
        ([], None, None),
        (["--resume"], "auto", None),
        (["--resume", "auto", "--seed", "3"], "auto", None),
        (["--seed", "3", "--resume", "runs/a"], "runs/a", Path("runs/a")),
    ],
)
def test_what_resume_means(words: list[str], resume: str | None, checkpoint: Path | None) -> None:
    command, _ = parse_over_recipe(TrainCommand, ["demo", *words], verb="train")
    assert (command.resume, command.checkpoint) == (resume, checkpoint)


@dataclass(frozen=True)
class Verb:
    """A verb with a section of its own."""

    few: int = 3
    rerank: Annotated[RerankConfig, tyro.conf.arg(name="")] = field(default_factory=RerankConfig)


def test_a_command_has_a_section_validated() -> None:
    found = parse_flags(Verb, ["--few", "4", "--top-k", "7", "--no-enabled"], prog="verb")
    assert (found.few, found.rerank.top_k, found.rerank.enabled) == (4, 7, False)
    with pytest.raises(FlagError, match="top_k: input should be greater than or equal to 1, got 0"):
        parse_flags(Verb, ["--top-k", "0"], prog="verb")


def test_words_of_others_are_left_in_order() -> None:
    found, others = parse_known_flags(Verb, ["--log-dir", "a b", "--few", "4", "--tee=3", "x"], prog="verb")
    assert found.few == 4
    assert others == ["--log-dir", "a b", "--tee=3", "x"]


def _is_a_key(dotted: str) -> bool:
    here: Any = Recipe
    for name in dotted.replace("-", "_").split("."):
        name = name.removeprefix("no_")
        if name not in getattr(here, "model_fields", {}):
            return False
        here = here.model_fields[name].annotation
    return True


def test_flags_of_other_programs_are_answered_with_keys_that_exist() -> None:
    named = {key for answer in FOREIGN.values() for key in re.findall(r"--([a-z]+(?:\.[a-z0-9-]+)+)", answer)}
    assert len(named) > 25
    assert all(map(_is_a_key, named)), [key for key in named if not _is_a_key(key)]
    assert not _is_a_key("data.no-such")
    with pytest.raises(FlagError, match=r"unknown flag --ckpt_path; here it is --checkpoint of `rerankvpr eval`"):
        parse_over_recipe(TrainCommand, ["demo", "--ckpt_path", "x"], verb="train")


def test_an_address_is_no_path_of_this_machine() -> None:
    for kind, words in ((ExportCommand, ["runs/x", "http://ann:secret1@h/x.onnx"]), (Recipe, ["--output", "s3://b/x"])):
        with pytest.raises(FlagError, match=r"(--out|output): (http://h|s3://b)/x.* is an address; expected a path of"):
            parse_flags(kind, words, prog="p")
