"""Checkpoints of untrained networks, as a training leaves them, without a training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

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
