"""What a training would refuse, found beforehand: no process group, no weights in memory, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import Recipe
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from data_pipeline.storage import StorageError
from eval.benchmarks.load import load_benchmarks
from memory.global_loss import GlobalLoss
from model.facets import FacetReader
from model.network import PlaceModel, meta_model
from model.weights import backbone_weights, read_weights
from trainer.batches import images_per_rank
from trainer.checkpoint import check_resumable
from trainer.checkpoint_folder import find_checkpoint, newest_valid
from trainer.engine import parameter_groups


def check_training(
    recipe: Recipe, world_size: int | None, *, resume: bool = False, checkpoint: Path | None = None
) -> list[str]:
    """Raises what a training of this recipe would end with before its first step; returns what is not here.

    `world_size` is the number of ranks, None if it is not known. A line of the result names shards, benchmarks or
    weights that this machine does not have, or cannot reach; of those nothing but the name was checked. Raises
    ValueError (BenchmarkError, CheckpointError, WeightsError).
    """
    if world_size:
        images_per_rank(recipe, world_size)
    GlobalLoss(recipe.loss, recipe.memory, engine_reduces="sum")  # "mean" would ask the process group for its size
    model = meta_model(recipe.model)
    parameter_groups(model, recipe.optim)
    _check_facets(recipe, model)
    absent: list[str] = []
    places = _unless_absent(lambda: read_mixture(recipe.data), absent)
    if places:
        EpochPlans(places, recipe.data, seed=recipe.seed)
    for spec in recipe.eval.benchmarks:
        _unless_absent(partial(load_benchmarks, [spec], recipe.eval.data_root), absent)
    _unless_absent(lambda: _check_weights(recipe, model), absent)
    _check_output(recipe, places, resume=resume, checkpoint=checkpoint)
    return absent


def _unless_absent(check: Callable[[], Any], absent: list[str]) -> Any:
    """What `check` returns; what is not on this machine becomes a line of `absent`."""
    try:
        return check()
    except (FileNotFoundError, StorageError) as error:
        absent.append(str(error))
        return None


def _check_facets(recipe: Recipe, model: PlaceModel) -> None:
    rerank = recipe.eval.rerank
    if recipe.eval.benchmarks and rerank.enabled:
        try:
            FacetReader(model.backbone, layer=rerank.layer, facet=rerank.facet, saliency_layer=rerank.saliency_layer)
        except ValueError as error:
            raise ValueError(f"eval.rerank: {error}") from error


def _check_weights(recipe: Recipe, model: PlaceModel) -> None:
    """A file of weights fits the network; the published ones are not downloaded for this."""
    if recipe.model.weights not in ("timm", "random"):
        file = Path(recipe.model.weights)
        backbone_weights(model.backbone, file, read_weights(file))


def _check_output(recipe: Recipe, places: PlaceMixture | None, *, resume: bool, checkpoint: Path | None) -> None:
    found = find_checkpoint(checkpoint) if checkpoint else newest_valid(recipe.output / "checkpoints")[0]
    if found and not resume:
        raise ValueError(
            f"{recipe.output} already holds a training (up to {found.name}); add --resume or change --output"
        )
    if found:
        check_resumable(found, recipe, places.digest if places else None)
