"""A weights file, exported by us or a published backbone's, as a network for use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open

from configs.explain import explain
from configs.load import check_network, stored_recipe
from configs.plugins import note_exported
from configs.reading import reading
from configs.schema import EvalConfig, ModelConfig, Recipe
from eval.describer import Describer
from eval.pixels import as_trained
from model.lora import merge_lora
from model.network import PlaceModel, build_model
from model.weights import WeightsError, infer_backbone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def recipe_of(file: Path) -> Recipe | None:
    """The recipe in an exported file's metadata, its weights those of the file; None for any other weights file.

    Raises WeightsError for a damaged file, RecipeError for a recipe of something else or of a
    network that is not known here, FileNotFoundError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights file {file} does not exist")
    if file.suffix != ".safetensors":
        return None
    with reading(file, "a file of tensors that can be read", WeightsError), safe_open(file, framework="pt") as content:
        metadata = content.metadata() or {}
    text = metadata.get("recipe")
    if text is None:
        return None
    note_exported(metadata, file)  # explains names that only a plug-in knows
    recipe = stored_recipe(text, file)
    check_network(recipe, file)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": str(file)})})


def describer_of_file(file: Path, *, device: torch.device | None = None, **settings: Any) -> Describer:
    """A network for use from a weights file: one of `rerankvpr export`, or a backbone's under the class token.

    `settings` are keys of the `eval` section that replace the recipe's. Raises WeightsError, ValueError,
    FileNotFoundError.
    """
    recipe = recipe_of(file)
    if recipe is None:
        model = {"backbone": infer_backbone(file), "weights": str(file), "finetune_last_n_blocks": 0}
        recipe = Recipe(model=ModelConfig.model_validate(model))
    return describer_of(build_model(recipe.model, seed=recipe.seed), recipe, str(file), device=device, **settings)


def describer_of(
    model: PlaceModel, recipe: Recipe, source: str, *, device: torch.device | None = None, **settings: Any
) -> Describer:
    """A network for use from one that holds its weights, in the precision in which its training evaluated it."""
    merge_lora(model)
    config = as_trained(with_settings(recipe.eval, settings), recipe.data)
    if config.precision == "same":
        model.to(DTYPES[recipe.engine.precision])
        model.cast_frozen()
    return Describer(model.to(device or default_device()), config, source, recipe.model)


def with_settings(config: EvalConfig, settings: dict[str, Any]) -> EvalConfig:
    """The `eval` section with some keys replaced; those of `rerank` are given as a mapping of the ones that change.

    Raises ValueError, one line a fault.
    """
    rerank = settings.get("rerank")
    if isinstance(rerank, dict):
        settings = {**settings, "rerank": {**config.rerank.model_dump(), **rerank}}
    try:
        return EvalConfig.model_validate({**config.model_dump(), **settings})
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, EvalConfig))) from error


def default_device() -> torch.device:
    """The current GPU where torch has one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
