"""A LoRA training, stopped and resumed, is the straight one bit for bit; merged, it is one network everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import torch.distributed as dist

import rerankvpr
from configs.schema import ModelConfig, Recipe
from data_pipeline.images import normalise
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.photo_list import list_source
from model.lora import is_lora
from model.network import build_model
from tests.checkpoints import write_checkpoint
from tests.curves import curve
from tests.photos import write_gsv_cities, write_noise_benchmark
from tests.ranks import on_ranks, shared_folder
from tests.test_lora import trained as with_products
from tests.training import last_checkpoint, same_state
from trainer.checkpoint import load_model_weights
from trainer.export import export_network
from trainer.logged_model import save_pyfunc

SIDES = {"tiny14": 28, "tiny16": 32}
LORA = {"weights": "random", "finetune": "lora", "finetune_last_n_blocks": 3, "lora_rank": 2}


def trained(folder: Path, name: str, backbone: str, steps: int, stage: int, *, resume: bool = False) -> Path:
    """The last checkpoint of a training of so many steps on all ranks."""
    data = {"shards": str(folder / "shards"), "places_per_batch": 4, "images_per_place": 2}
    recipe = {
        "data": {**data, "image_size": SIDES[backbone], "decode_threads": 0},
        "model": {**LORA, "backbone": backbone, "lora_targets": ["q", "v", "mlp"], "aggregator": "gem"},
        "memory": {"size": 20, "start_epoch": 0},
        "engine": {"zero_stage": stage},
        "optim": {"lr": 1e-2, "schedule": "none", "warmup_steps": 0},
        "trainer": {"epochs": 99, "max_steps": steps, "validate_every_epochs": 0},
        "tracking": {"enabled": False},
    }
    torch.manual_seed(0)
    curve(folder, name, recipe, resume=resume)
    return last_checkpoint(folder / name)


def check_a_training_resumes_bit_for_bit() -> None:
    """Of DINOv2 at ZeRO 1 and of DINOv3 at ZeRO 3; the products alone have moved."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(12), 3)})
        write_shards(read_gsv_cities(folder / "native", min_images_per_place=3), folder / "shards")
    dist.barrier()
    for backbone, stage in (("tiny14", 1), ("tiny16", 3)):
        straight = trained(folder, f"{backbone}-straight", backbone, 4, stage)
        trained(folder, f"{backbone}-stopped", backbone, 2, stage)
        stopped = trained(folder, f"{backbone}-stopped", backbone, 4, stage, resume=True)
        if dist.get_rank() == 0:
            same_state(straight, stopped)
            config = ModelConfig.model_validate({**LORA, "backbone": backbone, "lora_targets": ["q", "v", "mlp"]})
            config = config.model_copy(update={"aggregator": "gem"})
            before, after = build_model(config).state_dict(), build_model(config)
            load_model_weights(after, straight)
            moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
            assert moved == {name for name in before if is_lora(name)} | {"aggregator.p"}
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


test_on_ranks = on_ranks(__file__, (1, 2))


@pytest.mark.parametrize("backbone", SIDES)
def test_merged_it_is_one_network_in_exports_mlflow_and_an_index(
    backbone: str, single_process: None, tmp_path: Path
) -> None:
    side = SIDES[backbone]
    model = {**LORA, "backbone": backbone, "lora_targets": ["qkv" if backbone == "tiny14" else "k", "proj", "mlp"]}
    about = {"model": model, "data": {"image_size": side}, "eval": {"image_size": side, "rerank": {"top_k": 3}}}
    recipe = Recipe.model_validate(about)
    checkpoint, network = write_checkpoint(
        tmp_path / "run", recipe, network=with_products(build_model(recipe.model).eval())
    )
    images = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    describer = rerankvpr.load(checkpoint, device="cpu")
    expected = describer.describe(images)
    with torch.inference_mode():
        unmerged = network(normalise(torch.from_numpy(images).permute(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(expected, unmerged, atol=2e-5)  # float32 adds in another order
    exported = export_network(checkpoint, tmp_path / "network.safetensors")
    np.testing.assert_allclose(rerankvpr.load(exported.file, device="cpu").describe(images), expected, atol=1e-6)
    save_pyfunc(exported.file, exported.recipe, tmp_path / "model", "run", "m-1")
    np.testing.assert_allclose(mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images), expected, atol=1e-6)
    write_noise_benchmark(tmp_path)
    photos = list_source(str(tmp_path / "images" / "test" / "database"))
    build_index(describer, photos, tmp_path / "index")
    opened = Index.open(tmp_path / "index", device="cpu")
    assert not any(is_lora(name) for name in opened.network.state_dict())
    np.testing.assert_array_equal(opened.describer.describe(images), expected)
