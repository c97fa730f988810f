"""LoRA: starts from the backbone, trains its products alone, is one network at every ZeRO stage, and merges."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import save_file

from configs.schema import EngineConfig, ModelConfig, OptimConfig, Recipe, RerankConfig
from eval.local_features import read_local
from eval.weights_file import describer_of, describer_of_file
from model.lora import LoraLinear, is_lora, merge_lora
from model.network import PlaceModel, build_model
from tests.checkpoints import write_checkpoint
from tests.ranks import on_ranks, shared_folder
from trainer.export import export_network

TARGETS = (["q", "v"], ["k"], ["qkv"], ["proj", "mlp"], ["q", "k", "v", "proj", "mlp"])


def config(**changes: Any) -> ModelConfig:
    fields = {"backbone": "tiny14", "weights": "random", "aggregator": "gem", "finetune": "lora", "lora_rank": 4}
    return ModelConfig.model_validate({**fields, "finetune_last_n_blocks": 3, **changes})


def trained(model: PlaceModel) -> PlaceModel:
    """With products that change what the network computes: B is 0 at the start."""
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def images(count: int = 3, side: int = 42) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", TARGETS)
def test_it_starts_from_the_backbone_and_merges_into_one(targets: list[str]) -> None:
    model, plain = build_model(config(lora_targets=targets), seed=2), build_model(config(finetune="all"), seed=2)
    with torch.inference_mode():
        assert torch.equal(model(images()), plain(images()))
        before = [trained(model)(images()), *read_local(model, images(), RerankConfig())]
        assert (before[0] - plain(images())).abs().max() > 1e-4
    merge_lora(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.inference_mode():
        after = [model(images()), *read_local(model, images(), RerankConfig())]
    for one, other in zip(before, after, strict=True):  # float32 adds in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_products_and_aggregator_are_trained_alone() -> None:
    model = build_model(config(lora_targets=["v", "mlp"]))
    (model(images()) @ torch.linspace(-1, 1, model.descriptor_size)).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {is_lora(name) for name in with_gradient - {"aggregator.p"}} == {True}
    assert {model.layer_of(name) for name in with_gradient} == {2, 3, 4, 5}
    assert model.layer_of("backbone.blocks.1.attn.qkv.lora.a") == 2
    assert not isinstance(model.backbone.blocks[0].attn.qkv, LoraLinear)
    assert sum(p.numel() for name, p in model.named_parameters() if is_lora(name)) == 3 * 4 * (
        (128 + 128) + (128 + 512) + (512 + 128)
    )


def test_a_frozen_trunk_in_bf16() -> None:
    """Matrices beside LoRA are kept in bf16 too; what is trained is not, and merging rounds nothing more."""
    model = trained(build_model(config(frozen_precision="bf16", lora_targets=["q", "v"], finetune_last_n_blocks=4)))
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["backbone.patch_embed.proj.weight"] == kinds["backbone.blocks.0.attn.qkv.bias"] == torch.bfloat16
    assert {kinds[f"backbone.blocks.3.{name}"] for name in ("norm1.weight", "mlp.fc1.weight", "attn.qkv.lora.a")} == {
        torch.float32
    }
    whole = build_model(config(lora_targets=["q", "v"], finetune_last_n_blocks=4))
    whole.load_state_dict(model.state_dict())
    with torch.inference_mode():
        found = model(images())
        torch.testing.assert_close(found, whole(images()), rtol=0, atol=5e-3)  # of 8 bits of mantissa in 4 blocks
        merge_lora(model)
        torch.testing.assert_close(model(images()), found, rtol=0, atol=1e-3)  # the products are no longer rounded


@pytest.mark.parametrize("precision", ["same", "bf16"])
def test_an_export_gives_the_descriptors_of_the_checkpoint(tmp_path: Path, precision: str) -> None:
    recipe = Recipe(model=config(lora_targets=["q", "v", "proj"], frozen_precision=precision))
    run = tmp_path / "run"
    checkpoint, network = write_checkpoint(run, recipe)
    trained(network)
    save_file(
        {k: v.float().contiguous() for k, v in network.state_dict().items()},
        checkpoint / "model-00000-of-00001.safetensors",
    )
    with torch.inference_mode():
        expected = network(images())
    exported = export_network(checkpoint, tmp_path / "network.safetensors")
    assert not any(is_lora(name) for name in describer_of_file(exported.file).model.state_dict())
    tolerance = 1e-5 if precision == "same" else 1e-3  # bf16 rounds the merged matrices where it rounded W alone
    for describer in (describer_of_file(exported.file), describer_of(network, recipe, "")):
        with torch.inference_mode():
            torch.testing.assert_close(describer.model(images()), expected, rtol=0, atol=tolerance)
    again = build_model(recipe.model.model_copy(update={"weights": str(exported.file)}))  # trained on from
    with torch.inference_mode():
        torch.testing.assert_close(again(images()), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_targets": []}, "lora_targets names no matrix"),
        ({"lora_targets": ["q", "qkv"]}, "qkv has one product for q, k and v; name it, or those"),
        ({"lora_targets": ["o"]}, "q"),
        ({"finetune_last_n_blocks": 0}, "finetune lora needs finetune_last_n_blocks above 0"),
        ({"lora_rank": 0}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**changes)


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="finetune_last_n_blocks 5: the backbone has 4 blocks"):
        build_model(config(finetune_last_n_blocks=5))


Layout = tuple[int, str, int, str]  # ZeRO stage, frozen precision, chunks, precision


def _engine(layout: Layout) -> Any:
    from trainer.engine import build_engine, partitioner

    stage, frozen, chunks, precision = layout
    settings = EngineConfig.model_validate({"zero_stage": stage, "encode_chunks": chunks, "precision": precision})
    part = partitioner(settings)
    model = build_model(config(lora_targets=["q", "v", "mlp"], frozen_precision=frozen), partition=part)
    model.activation_checkpointing = chunks > 1
    optim = OptimConfig(lr=1e-2, layer_decay=0.8)
    return build_engine(model, engine=settings, optim=optim, images_per_rank=4 // dist.get_world_size())


def _step(engine: Any, number: int) -> float:
    """A step on this rank's part of four images; the loss of all."""
    from trainer.engine import clip_and_update

    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(number))[rank * 4 // world :][: 4 // world]
    y = torch.randn(4, 128, generator=torch.Generator().manual_seed(99))[rank * 4 // world :][: 4 // world]
    total = 0.0
    chunks = engine.gradient_accumulation_steps()
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    for x_chunk, y_chunk in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        loss = -(engine(x_chunk.to(dtype)) * y_chunk).sum()
        engine.backward(loss, scale_wrt_gas=False)
        clip_and_update(engine, 1.0)
        total += loss.item()
    summed = torch.tensor(total)
    dist.all_reduce(summed)
    return summed.item()


def check_all_stages_are_one_network_and_resume_from_each_other() -> None:
    """Steps 0 and 1 at one layout, saved, steps 2 and 3 at another: the losses of the run that stayed."""
    from trainer.engine_state import StoredTensors, put_state, read_numbers, take_state

    folder, rank = shared_folder(), dist.get_rank()
    layouts: list[Layout] = [(stage, "same", 1, "fp32") for stage in (0, 1, 2, 3)]
    layouts += [(1, "same", 2, "fp32"), (3, "same", 2, "fp32"), (1, "bf16", 1, "fp32"), (3, "bf16", 1, "bf16")]
    straight, numbers = {}, {}
    for layout in layouts:
        engine = _engine(layout)
        losses = [_step(engine, number) for number in range(2)]
        saved = folder / "-".join(map(str, layout))
        saved.mkdir(exist_ok=True)
        state = take_state(engine)
        save_file(state.weights, saved / f"model-{rank}.safetensors")
        save_file(state.optimizer, saved / f"optimizer-{rank}.safetensors")
        numbers[layout] = state.numbers
        straight[layout] = losses + [_step(engine, number) for number in range(2, 4)]
        # fp32 adds in another order; of bf16 the first loss alone, for Adam's first updates are signs of gradients
        exact = layout[1] == "same"
        compared = slice(4 if exact else 1)
        found, expected = torch.tensor(straight[layout][compared]), torch.tensor(straight[layouts[0]][compared])
        assert torch.allclose(found, expected, atol=1e-3 if exact else 2e-2), (layout, straight)
        assert abs(straight[layout][3] - straight[layout][0]) > 0.1  # it does learn
    dist.barrier()
    for source, target in (
        ((1, "same", 1, "fp32"), (3, "same", 1, "fp32")),
        ((3, "same", 1, "fp32"), (0, "same", 1, "fp32")),
    ):
        engine = _engine(target)
        saved = folder / "-".join(map(str, source))
        files = [StoredTensors(sorted(saved.glob(f"{kind}-*"))) for kind in ("model", "optimizer")]
        put_state(engine, *files, read_numbers(numbers[source]), lambda e=engine: e(torch.zeros(1, 3, 28, 28)))
        went_on = [_step(engine, number) for number in range(2, 4)]
        assert torch.allclose(torch.tensor(went_on), torch.tensor(straight[source][2:]), atol=1e-3), (source, target)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


test_on_ranks = on_ranks(__file__, (2,))
