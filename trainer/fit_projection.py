"""`model.projection_dim`: fitted before the first step, on descriptors of training images from all over an epoch."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from configs.ranks import on_all_ranks
from configs.schema import Recipe
from data_pipeline.images import normalise
from model.projection import whitening
from trainer.batches import Batches
from trainer.engine_state import write_weight
from trainer.state import TrainingState


@torch.no_grad()
def fit_projection(state: TrainingState, batches: Batches, recipe: Recipe) -> int:
    """Fits the network's projection, if it has one that was not loaded; returns the number of images.

    Every rank must call this. Raises ValueError if the images span too few directions.
    """
    model = state.model
    if model.projection is None or model.projection_loaded:
        return 0
    engine, was_training = state.engine, model.training
    engine.eval()
    per_step = recipe.data.places_per_batch * recipe.data.images_per_place
    steps = min(batches.steps_per_epoch, math.ceil(recipe.model.projection_images / per_step))
    model.projects = False
    parts = [_of_all_ranks(engine(normalise(batch.images_B3HW.to(engine.device)))) for batch in batches.spread(steps)]
    model.projects = True
    sample_ND = torch.cat(parts)
    mean_D, weight_kD = sample_ND[0].float(), sample_ND.new_empty(recipe.model.projection_dim, sample_ND.shape[1])
    with on_all_ranks():
        if dist.get_rank() == 0:
            mean_D, weight_kD = whitening(sample_ND.cpu(), recipe.model.projection_dim)
    for parameter, tensor in ((model.projection.mean, mean_D), (model.projection.weight, weight_kD)):
        shared = tensor.to(engine.device, torch.float32).contiguous()
        dist.broadcast(shared, 0)
        write_weight(parameter, shared)
    engine.train(was_training)
    return len(sample_ND)


def _of_all_ranks(descriptors_BD: torch.Tensor) -> torch.Tensor:
    """The descriptors of a step on all ranks, in rank order."""
    parts = [torch.empty_like(descriptors_BD) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, descriptors_BD.contiguous())
    return torch.cat(parts)
