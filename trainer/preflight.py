"""What a training would refuse, found beforehand: no process group, no weights in memory, no GPU."""

from __future__ import annotations

from pathlib import Path

from configs.image_size import height_width
from configs.schema import Recipe
from data_pipeline.mixture import EpochPlans
from memory.global_loss import GlobalLoss
from model.facets import FacetReader
from model.network import PlaceModel, meta_model
from model.weights import backbone_weights, read_weights
from trainer.checkpoint import check_resumable
from trainer.checkpoint_folder import find_checkpoint, newest_valid
from trainer.engine import parameter_groups
from trainer.first_checks import Faults, check_data


def check_training(
    recipe: Recipe, world_size: int | None, *, resume: bool = False, checkpoint: Path | None = None
) -> list[str]:
    """Raises all that a training of this recipe would end with before its first step; returns what is not here.

    `world_size` is the number of ranks, None if it is not known. A line of the result names shards, benchmarks or
    weights that this machine does not have, or cannot reach; of those nothing but the name was checked. Raises
    ValueError with a line for each fault.
    """
    faults = Faults()
    _, plans = check_data(recipe, world_size, faults, resume=resume, checkpoint=checkpoint)
    # "mean" would ask the process group for its size
    faults.of(lambda: GlobalLoss(recipe.loss, recipe.memory, engine_reduces="sum"))
    with faults.gather():
        model = meta_model(recipe.model)
        faults.of(lambda: parameter_groups(model, recipe.optim))
        faults.of(lambda: _check_facets(recipe, model))
        _check_weights(recipe, model)
    faults.of(lambda: _check_resumable(recipe, plans, checkpoint))
    faults.raise_all()
    return faults.absent


def _check_patches(recipe: Recipe, model: PlaceModel) -> None:
    least = model.aggregator.least_patches
    for key, size in (("data.image_size", recipe.data.image_size), ("eval.image_size", recipe.eval.image_size)):
        rows, columns = model.spec.grid(*height_width(size))
        if rows * columns < least:
            raise ValueError(f"{key}: {rows} x {columns} patches; {recipe.model.aggregator} needs {least} or more")


def _check_facets(recipe: Recipe, model: PlaceModel) -> None:
    rerank = recipe.eval.rerank
    if (recipe.eval.benchmarks or recipe.data.held_out) and rerank.enabled:
        try:
            FacetReader(model.backbone, layer=rerank.layer, facet=rerank.facet, saliency_layer=rerank.saliency_layer)
        except ValueError as error:
            raise ValueError(f"eval.rerank: {error}") from error


def _check_weights(recipe: Recipe, model: PlaceModel) -> None:
    """A file of weights fits the network; the published ones are not downloaded for this."""
    if recipe.model.weights not in ("timm", "random"):
        file = Path(recipe.model.weights)
        backbone_weights(model.backbone, file, read_weights(file))


def _check_resumable(recipe: Recipe, plans: EpochPlans | None, checkpoint: Path | None) -> None:
    found = find_checkpoint(checkpoint) if checkpoint else newest_valid(recipe.output / "checkpoints")[0]
    if found:
        check_resumable(found, recipe, plans.digest if plans else None)
