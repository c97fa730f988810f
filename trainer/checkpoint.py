"""What a checkpoint holds and how it is restored: by rank, weights, optimizer state and random state, the queue, the
position in the epoch plan and the recipe. Writing is `checkpoint_writer`'s; see `checkpoint_folder` for the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from configs.image_size import height_width
from configs.load import recipe_text
from configs.ranks import from_rank_0
from configs.reading import reading
from configs.schema import Recipe
from data_pipeline.hard_plan import Composed
from trainer import recorded_plugins
from trainer.checkpoint_folder import find_checkpoint, newest_valid
from trainer.engine_state import StoredTensors, put_state, read_numbers, take_state
from trainer.manifest import HARD_PLACES, CheckpointError, is_listed, part_files
from trainer.recipe_changes import recipe_changes
from trainer.state import Progress, TrainingState

Contents = dict[str, dict[str, torch.Tensor] | str]  # what one rank writes: tensors or text by file name


def recipe_files(recipe: Recipe) -> dict[str, str]:
    """The files of a checkpoint that are the same at every step, as text."""
    files = {"recipe.yaml": recipe_text(recipe)}
    if recipe.plugins:
        files[recorded_plugins.FILE] = recorded_plugins.plugins_text(recipe)
    return files


def checkpoint_contents(state: TrainingState, texts: Mapping[str, str]) -> Contents:
    """A copy in CPU memory of what this rank writes. Every rank must call this; training may continue at once.

    `texts` are those of `recipe_files`.
    """
    engine, queue, drift = take_state(state.engine), state.queue, state.drift
    rank, world = dist.get_rank(), dist.get_world_size()
    part = f"{rank:05d}-of-{world:05d}.safetensors"
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    contents: Contents = {
        f"model-{part}": engine.weights,
        f"optimizer-{part}": engine.optimizer,
        f"random-{part}": random,
    }
    if rank == 0 or queue.placement == "sharded":
        contents[f"queue-{queue.rank:05d}-of-{queue.num_shards:05d}.safetensors"] = _buffers(queue)
    if rank == 0:
        if drift:
            contents["drift.safetensors"] = _buffers(drift)
        if state.composed:
            contents[HARD_PLACES] = _composed_tensors(state.composed)
        contents["optimizer.json"] = engine.numbers
        contents["state.json"] = json.dumps(asdict(state.progress), indent=1)
        contents.update(texts)
    return contents


def _composed_tensors(composed: Composed) -> dict[str, torch.Tensor]:
    return {
        "epoch": torch.tensor(composed.epoch),
        "places_SP": torch.from_numpy(composed.places_SP),
        "is_hard_S": torch.from_numpy(composed.is_hard_S),
    }


def _composed(file: Path) -> Composed:
    with reading(file, "the composed steps of an epoch", CheckpointError):
        stored = load_file(file)
        return Composed(int(stored["epoch"]), stored["places_SP"].numpy(), stored["is_hard_S"].numpy())


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()}


def choose_checkpoint(folder: Path, given: Path | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from: `given`, else the newest of `folder` that verifies; with notes on damaged ones.

    Read and verified by rank 0, for all; every rank must call this. Raises CheckpointError if `given` is damaged.
    """
    return from_rank_0(lambda: (find_checkpoint(given), []) if given else newest_valid(folder))


def _stored_progress(checkpoint: Path) -> Progress:
    with reading(checkpoint / "state.json", "the state of a training", CheckpointError):
        return Progress(**json.loads((checkpoint / "state.json").read_text()))


def check_resumable(checkpoint: Path, recipe: Recipe, dataset: str | None) -> None:
    """Raises CheckpointError if a training by this recipe cannot resume from a checkpoint.

    `dataset` is the digest of the shard sets, None if they are not here.
    """
    trained_on = _stored_progress(checkpoint).dataset
    if dataset is not None and trained_on != dataset:
        raise CheckpointError(
            f"{checkpoint} was trained on shards with digest {trained_on}, data.shards, data.mix, data.sets and "
            f"data.held_out now have {dataset}: the order of data would be another; resume with the same, "
            "or export the network and start from it with model.weights"
        )
    recipe_changes(recipe, checkpoint)


def load_checkpoint(checkpoint: Path, state: TrainingState, recipe: Recipe, dataset: str) -> None:
    """Restores engine, queue, progress and random state on every rank, at any world size and ZeRO stage.

    `dataset` is the digest of the shard sets. Raises CheckpointError if they are not the checkpoint's.
    """
    engine, queue, drift = state.engine, state.queue, state.drift
    check_resumable(checkpoint, recipe, dataset)
    progress = _stored_progress(checkpoint)
    blank = torch.zeros(1, 3, *height_width(recipe.data.image_size), device=engine.device)
    weights, optimizer = (StoredTensors(part_files(checkpoint, kind)) for kind in ("model", "optimizer"))
    with reading(checkpoint / "optimizer.json", "the numbers of an optimizer", CheckpointError):
        numbers = read_numbers((checkpoint / "optimizer.json").read_text())
    put_state(engine, weights, optimizer, numbers, lambda: engine(blank))
    queue.load_shards(load_file(file) for file in part_files(checkpoint, "queue"))
    if drift and is_listed(checkpoint, "drift.safetensors"):
        drift.load_state_dict(load_file(checkpoint / "drift.safetensors"))
    if is_listed(checkpoint, HARD_PLACES):
        state.composed = _composed(checkpoint / HARD_PLACES)
    random = checkpoint / f"random-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    if is_listed(checkpoint, random.name):  # at another world size nothing is the same to go on with
        states = load_file(random)
        torch.set_rng_state(states["cpu"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
    state.progress = progress


def checkpoint_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The network's state dict in float32, all ranks' parts together."""
    return dict(StoredTensors(part_files(checkpoint, "model")))


def load_model_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into a model built from its recipe."""
    with reading(checkpoint, "a checkpoint of the network in its recipe", CheckpointError):
        model.load_state_dict(checkpoint_weights(checkpoint))
