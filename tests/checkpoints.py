"""Checkpoints of untrained networks, as a training leaves them, without a training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.files import file_sha256
from configs.load import recipe_text
from configs.schema import Recipe
from model.network import PlaceModel, build_model
from trainer import recorded_plugins
from trainer.checkpoint_folder import point
from trainer.manifest import FORMAT, MANIFEST
from trainer.state import Progress


def gem_recipe(side: int, *, data: dict[str, Any] | None = None, eval: dict[str, Any] | None = None) -> Recipe:
    """A recipe of tiny14 with GeM at images of `side` pixels, by which most patches of noise match."""
    rerank = {"nn_match_thresh": 0.2, "saliency_thresh": 0.1}
    return Recipe.model_validate(
        {
            "data": {"image_size": side, **(data or {})},
            "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem"},
            "eval": {"image_size": side, "rerank": rerank, **(eval or {})},
        }
    )


def write_checkpoint(
    run: Path, recipe: Recipe, *, seed: int = 5, network: PlaceModel | None = None
) -> tuple[Path, PlaceModel]:
    """A run's folder with one checkpoint, its newest, of `network`, or the recipe's drawn from `seed`; and that."""
    network = network or build_model(recipe.model, seed=seed).eval()
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    part = "00000-of-00001.safetensors"
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(weights, checkpoint / f"model-{part}")
    for kind in ("optimizer", "random", "queue"):
        save_file({kind: torch.zeros(1)}, checkpoint / f"{kind}-{part}")
    (checkpoint / "optimizer.json").write_text(json.dumps({"counts": {}, "scaler": {}}))
    (checkpoint / "state.json").write_text(json.dumps(asdict(Progress(step=1))))
    (checkpoint / "recipe.yaml").write_text(recipe_text(recipe))
    if recipe.plugins:
        (checkpoint / recorded_plugins.FILE).write_text(recorded_plugins.plugins_text(recipe))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": 1, "world_size": 1, "files": files}))
    point(run / "checkpoints" / "latest", checkpoint)
    return checkpoint, network


def write_run(folder: Path, recipe: Recipe) -> Path:
    """The output folder of a run in `folder`, with such a checkpoint."""
    write_checkpoint(folder / "run", recipe)
    return folder / "run"
