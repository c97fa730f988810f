"""The projection that ranks fit together is that of one process over the same images, at ZeRO-3 too."""

import shutil

import torch
import torch.distributed as dist

from configs.schema import Recipe
from data_pipeline.images import normalise
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from model.network import build_model
from model.projection import whitening
from tests.photos import write_gsv_cities
from tests.ranks import on_ranks, shared_folder


def check_ranks_fit_what_one_process_fits() -> None:
    import deepspeed

    from trainer.batches import Batches
    from trainer.fit_projection import fit_projection
    from trainer.process_group import Rank
    from trainer.state import build_state

    world, folder = dist.get_world_size(), shared_folder()
    if dist.get_rank() == 0:
        write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(12), 3)})
        write_shards(read_gsv_cities(folder / "native", min_images_per_place=3), folder / "shards")
    dist.barrier()
    data = {"shards": str(folder / "shards"), "places_per_batch": 4, "images_per_place": 2, "image_size": 28}
    network = {"backbone": "tiny14", "weights": "random", "aggregator": "gem", "finetune": "head"}
    recipe = Recipe.model_validate(
        {
            "data": {**data, "decode_threads": 0, "augmentation": "none"},
            "model": {**network, "projection_dim": 4, "projection_images": 16},
            "engine": {"zero_stage": 3 if world > 1 else 1},
        }
    )
    rank = Rank(dist.get_rank(), world, torch.device("cpu"))
    batches = Batches(recipe, rank)
    state = build_state(recipe, rank, images_per_rank=8 // world)
    assert fit_projection(state, batches, recipe) == 16
    whole = build_model(recipe.model.model_copy(update={"projection_dim": 0}), seed=recipe.seed).eval()
    with torch.inference_mode():
        parts = [whole(normalise(b.images_B3HW)) for b in Batches(recipe, Rank(0, 1, torch.device("cpu"))).spread(2)]
    mean, weight = whitening(torch.cat(parts), 4)
    projection = state.model.projection
    assert projection is not None
    with deepspeed.zero.GatheredParameters(list(projection.parameters())):
        torch.testing.assert_close(projection.mean.data, mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(projection.weight.data, weight, rtol=2e-3, atol=2e-3 * weight.abs().max().item())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


test_on_ranks = on_ranks(__file__, (1, 2))
