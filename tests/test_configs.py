"""Recipes load, document every key, and refuse what cannot run."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from configs.load import RECIPES, RecipeError, load_recipe, load_stored_recipe, recipe_text
from configs.renamed import RENAMED
from configs.schema import Recipe, Section


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe_text(recipe))
    assert load_recipe(copy) == recipe
    assert load_recipe(Path(path.stem)) == recipe


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    nested = [f.annotation for f in model.model_fields.values()]
    return [model] + [s for n in nested if isinstance(n, type) and issubclass(n, Section) for s in sections(n)]


def test_every_key_has_a_line_of_documentation() -> None:
    for section in sections(Recipe):
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert is_section or field.description, f"{section.__name__}.{name}"
        assert section.__doc__


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": {"shrads": "x"}}, "unknown key data.shrads; nearest: data.shards"),
        ({"memmory": {}}, "unknown key memmory; nearest: memory"),
        ({"model": {"backbone": "vits15"}}, "model.backbone: 'vits15' is not one of .* nearest: vits14"),
        ({"model": {"lora_targets": ["qk"]}}, r"model.lora_targets.0: 'qk' is not one of q, k, v, .*; nearest: "),
        ({"engine": {"zero_stage": 7}}, "engine.zero_stage: 7 is not one of 0, 1, 2, 3"),
        ({"data": {"image_size": 225}}, "data.image_size: 225 is not a multiple of the patch size 14; .* 224 or 238"),
        ({"data": {"places_per_batch": 0}}, "data.places_per_batch: input should be greater than or equal to 1, got 0"),
        ({"data": {"images_per_place": 1}}, "data.images_per_place"),
        ({"engine": {"precision": "bf16", "zero_stage": 0}}, "use zero_stage 1 or 2"),
        ({"eval": {"rerank": {"tpo_k": 3}}}, "nearest: eval.rerank.top_k"),
        ({"name": "a b"}, "not a plain name"),
        ({"engine": {"gradient_accumulation": 2}}, "has another name: write engine.encode_chunks"),
        ({"eval": {"rerank": {"store": "int8"}}}, "eval.rerank.store has another name: write eval.rerank.dtype"),
        (["a"], "expected a mapping"),
    ],
)
def test_bad_recipes_name_key_and_nearest(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_stored_recipe_loads_whatever_its_keys_were_called(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    old = {
        "loss": {"args": {"alpha": 3.0}},
        "engine": {"gradient_accumulation": 4},
        "eval": {"index": "HNSW32", "index_params": "efSearch=64", "rerank": {"store": "int8"}},
    }
    path.write_text(yaml.safe_dump(old))
    present = {
        "loss": {"args": {"alpha": 3.0}},
        "engine": {"encode_chunks": 4},
        "eval": {"faiss_index": "HNSW32", "faiss_params": "efSearch=64", "rerank": {"dtype": "int8"}},
    }
    assert load_stored_recipe(path) == Recipe.model_validate(present)
    keys = Recipe().as_flat()
    assert all(new in keys and old not in keys for old, new in RENAMED.items())


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)


def test_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="mini_vits"):
        load_recipe(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": {"precision": "bf16", "zero_stage": 0}}, "bf16 at zero_stage 0"),
        ({"engine": {"offload": "optimizer", "zero_stage": 0}}, "offload optimizer needs zero_stage"),
        ({"engine": {"offload": "all", "zero_stage": 2}}, "offload all needs zero_stage 3"),
        ({"engine": {"compile": True, "zero_stage": 3}}, "compile at zero_stage 3"),
        ({"engine": {"zero_stage": 3}, "model": {"frozen_precision": "bf16"}}, "needs engine.precision bf16"),
        ({"optim": {"schedule": "plateau"}}, "plateau needs validations"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate(changes)
