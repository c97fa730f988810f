"""FLOPs, memory by part and the planned run's command line; what blocks really keep and what engines really hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.flags import parse_flags
from configs.registry import BACKBONES
from configs.schema import Recipe
from data_pipeline.augment import randaugment_of
from launch.plan_command import main
from model.network import build_model, meta_model
from trainer.activations import block_activations
from trainer.engine import LIVE
from trainer.engine_state import keepers
from trainer.feeding import stream_line
from trainer.flops import forward_flops, model_flops, peak_tflops, step_flops
from trainer.memory_plan import GRIDS, blocks_behind_first_bucket, plan_memory
from trainer.parameter_sizes import parameter_sizes
from trainer.plan import Assumed, advice, plan, shortfall, summary_lines
from trainer.sent_bytes import bytes_sent


def recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe of a small network unless told otherwise."""
    model = {"backbone": "vits14", "weights": "random", **sections.pop("model", {})}
    return Recipe.model_validate({"model": model, "data": {"shards": "no/such/shards"}, **sections})


@pytest.mark.parametrize(
    ("backbone", "side", "gflop"),
    [
        ("vits14", 224, 12),
        ("vits14", 322, 28),
        ("vitb14", 224, 46),
        ("vitb14", 322, 101),
        ("vitl14", 224, 162),
        ("vitl14", 322, 348),
        ("vitg14", 224, 599),
        ("vitg14", 322, 1270),
    ],
)
def test_forward_flops_are_those_of_the_published_sizes(backbone: str, side: int, gflop: float) -> None:
    assert BACKBONES.get(backbone).num_tokens(side) == {224: 257, 322: 530}[side]
    assert forward_flops(BACKBONES.get(backbone), side) / 1e9 == pytest.approx(gflop, rel=0.015, abs=0.5)


def test_forward_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = meta_model(recipe(model={"backbone": "vitb14_reg"}).model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(3, 3, 98, 98, device="meta"))
    assert counter.get_total_flops() / 3 == pytest.approx(forward_flops(BACKBONES.get("vitb14_reg"), 98), rel=1e-3)


def test_a_step_costs_what_is_trained_and_what_is_computed_again() -> None:
    forward = forward_flops(BACKBONES.get("vits14"), 224)
    assert model_flops(recipe(model={"finetune": "all"})) == 3 * forward
    last_4 = recipe(model={"finetune_last_n_blocks": 4})
    assert model_flops(last_4) == pytest.approx(forward * (12 + 2 * 4) / 12, rel=0.02)
    assert step_flops(last_4) == model_flops(last_4)
    engine = {"activation_checkpointing": True, "encode_chunks": 2}
    again = step_flops(recipe(model={"finetune": "all"}, engine=engine))
    assert again == pytest.approx(5 * forward, rel=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla T4", "bf16", None),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L20", "bf16", None),
        ("NVIDIA B300 SXM6 AC", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA A30", "fp16", 165),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
    ],
)
def test_peaks_are_of_the_very_gpu(name: str, precision: str, tflops: float | None) -> None:
    assert peak_tflops(name, precision) == tflops


def test_the_peak_of_tf32() -> None:
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156
    assert peak_tflops("Tesla V100-SXM2-32GB", "fp32", tf32=True) == 15.7  # has none


@pytest.mark.parametrize(
    ("backbone", "dtype", "finetune"),
    [
        ("vits14", torch.float32, {"finetune": "all"}),
        ("vitg14", torch.bfloat16, {"finetune": "all"}),
        *(
            ("vits14", torch.float32, {"finetune": "lora", "lora_targets": targets, "finetune_last_n_blocks": 12})
            for targets in (["q", "v"], ["qkv", "mlp", "proj"], ["proj"])
        ),
        ("vitg14", torch.float32, {"finetune": "lora", "lora_targets": ["q"], "finetune_last_n_blocks": 40}),
    ],
)
def test_a_block_keeps_the_activations_that_are_planned_for(
    backbone: str, dtype: torch.dtype, finetune: dict[str, Any]
) -> None:
    """Counted from what autograd saves in the forward pass of one real block, parameters left out."""
    config = recipe(model={"backbone": backbone, **finetune}).model
    model = meta_model(config)
    block = model.backbone.blocks[3].to_empty(device="cpu").to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    owned = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, side = 3, 56
    x_BTC = torch.randn(images, model.spec.num_tokens(side), model.descriptor_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_BTC = block(x_BTC)
    assert out_BTC.requires_grad
    planned = images * block_activations(config, side, x_BTC.element_size())
    assert sum(saved.values()) == pytest.approx(planned, rel=0.06)


def test_parameters_are_counted_without_making_them() -> None:
    config = recipe(model={"backbone": "tiny14", "aggregator": "gem", "finetune_last_n_blocks": 2})
    sizes = parameter_sizes(config)
    real = build_model(config.model)
    assert sizes.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert sizes.total == sum(p.numel() for p in real.parameters())
    giant = parameter_sizes(recipe(model={"backbone": "vitg14"}))
    assert giant.total == pytest.approx(1.136e9, rel=0.01)


settings_of_an_engine = st.fixed_dictionaries(
    {
        "zero_stage": st.sampled_from([0, 1, 2, 3]),
        "offload": st.sampled_from(["none", "optimizer", "all"]),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "activation_checkpointing": st.booleans(),
        "encode_chunks": st.sampled_from([1, 3]),
    }
)


@settings(max_examples=60)
@given(engine=settings_of_an_engine, on_cpu=st.booleans())
def test_more_ranks_and_checkpointing_never_need_more(engine: dict[str, Any], on_cpu: bool) -> None:
    try:
        config = recipe(engine=engine, data={"shards": "x", "places_per_batch": 24})
    except ValueError:
        return  # a combination that DeepSpeed cannot do
    sizes = SIZES_OF_VITS
    peaks = [plan_memory(config, ranks=ranks, on_cpu=on_cpu, sizes=sizes).device_peak for ranks in (2, 3, 8)]
    assert peaks == sorted(peaks, reverse=True)
    again = config.model_copy(update={"engine": config.engine.model_copy(update={"activation_checkpointing": True})})
    assert plan_memory(again, ranks=2, on_cpu=on_cpu, sizes=sizes).device_peak <= peaks[0]
    assert all(
        part.device >= 0 and part.host >= 0 for part in plan_memory(config, ranks=2, on_cpu=False, sizes=sizes).parts
    )


SIZES_OF_VITS = parameter_sizes(recipe())


def test_a_bucket_that_is_sent_while_backward_runs_finds_fewer_activations() -> None:
    """A bucket takes 50 million elements: all of ViT-S, seven blocks of ViT-B, one of ViT-g and a part of the next.

    With overlap 16 million: two of ViT-B.
    """

    def planned(name: str, **engine: Any) -> tuple[int | None, dict[str, float]]:
        data = {"shards": "none", "places_per_batch": 8 * 30}
        config = recipe(model={"backbone": name, "finetune": "all"}, engine={"precision": "bf16", **engine}, data=data)
        sizes = SIZES_OF_ALL[name]
        phases = plan_memory(config, ranks=8, on_cpu=False, sizes=sizes).phases
        behind = blocks_behind_first_bucket(config, sizes)
        return behind, {str(phase): device for phase, (device, _) in phases.items()}

    for engine in ({"zero_stage": 2}, {"zero_stage": 3, "encode_chunks": 4}):
        blocks, small = planned("vits14", **engine)
        assert blocks is None
        assert "bucket" not in small
        blocks, base = planned("vitb14", **engine)
        assert blocks == 7
        assert base["bucket"] < base["backward"]
    assert "bucket" not in planned("vitb14", zero_stage=1)[1]
    blocks, base = planned("vitb14", zero_stage=1, overlap=True)
    assert blocks == 2
    assert base["bucket"] < base["backward"]
    blocks, giant = planned("vitg14", zero_stage=3, activation_checkpointing=True)
    assert blocks == 1
    assert giant["bucket"] == max(giant.values())  # the copy that is sent takes more than the activations that are gone


SIZES_OF_ALL = {
    name: parameter_sizes(recipe(model={"backbone": name, "finetune": "all"}))
    for name in ("vits14", "vitb14", "vitg14")
}


def held(config: Recipe, ranks: int, start: str) -> float:
    """Bytes of the parts whose names begin with `start`, on a GPU, host and device."""
    parts = plan_memory(config, ranks=ranks, on_cpu=False, sizes=SIZES_OF_VITS).parts
    return sum(part.device + part.host for part in parts if part.name.startswith(start))


def test_zero_stages_hold_what_they_say() -> None:
    """Weights 2 bytes per element in bf16, masters and Adam's moments 12; partitioned from stage 3 and stage 1 on."""
    trained, frozen = SIZES_OF_VITS.trained, SIZES_OF_VITS.frozen
    for stage in (1, 2, 3):
        config = recipe(engine={"zero_stage": stage, "precision": "bf16"})
        assert held(config, 4, "optimizer") - held(config, 4, "optimizer, while") == trained / 4 * 12
        partitioned = {3: (trained + frozen) * 2 / 4}.get(stage, (trained + frozen) * 2)
        whole = (
            held(config, 4, "weights, small") + held(config, 4, "weights, gathered") + held(config, 4, "weights, as")
        )
        assert held(config, 4, "weights") - whole == partitioned
    offloaded = plan_memory(
        recipe(engine={"zero_stage": 3, "offload": "all"}), ranks=4, on_cpu=False, sizes=SIZES_OF_VITS
    )
    on_host = {part.name for part in offloaded.parts if part.host}
    assert {"weights, partitioned", "gradients", "optimizer"} <= on_host
    frozen_bf16 = recipe(engine={"zero_stage": 1}, model={"frozen_precision": "bf16"})
    assert held(recipe(), 1, "weights") - held(frozen_bf16, 1, "weights") == pytest.approx(2 * frozen)


@settings(max_examples=50)
@given(
    parameters=st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1, max_size=40),
    ranks=st.integers(1, 9),
)
def test_ranks_keep_equally_much_of_a_checkpoint(parameters: list[tuple[int, bool]], ranks: int) -> None:
    kept = [0] * ranks
    for (numel, trained), keeper in zip(parameters, keepers(parameters, ranks), strict=True):
        kept[keeper] += numel * (3 if trained else 1)
    assert max(kept) - min(kept) <= max(numel * (3 if trained else 1) for numel, trained in parameters)


def test_bytes_sent_are_those_of_rings() -> None:
    sizes, ring = SIZES_OF_VITS, 3 / 4
    at = {
        stage: bytes_sent(recipe(engine={"zero_stage": stage}), sizes, 4)["gradients, reduced"] for stage in (0, 1, 3)
    }
    assert at == {0: 2 * ring * 4 * sizes.trained, 1: 2 * ring * 4 * sizes.trained, 3: ring * 4 * sizes.trained}
    at_3 = recipe(engine={"zero_stage": 3})
    assert bytes_sent(at_3, sizes, 4)["weights, gathered for use"] == ring * 4 * sizes.total  # kept until backward
    large = replace(sizes, trained=sizes.trained + LIVE)
    assert bytes_sent(at_3, large, 4)["weights, gathered for use"] == ring * 4 * (large.total + large.trained)
    assert not bytes_sent(recipe(), sizes, 1)


@pytest.mark.parametrize(("flag", "value"), [("--ranks", "0"), ("--device-gb", "-1"), ("--tflops", "inf")])
def test_assumptions_are_above_zero(flag: str, value: str) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        main(["demo", flag, value])


def test_the_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    flags = ["--ranks", "8", "--device-gb", "80", "--tflops", "400", "--json", str(file)]
    shards = str(tmp_path / "none")
    assert main(["gsv_cities_vitb", "--data.shards", shards, "--trainer.max-steps", "1000", *flags]) == 0
    text = capsys.readouterr().out
    assert "28.4 M parameters trained, 58.2 M frozen; 8 rank(s) on GPU" in text
    assert f"1000 in all (no shard index at {shards}" in text
    figures = json.loads(file.read_text())
    assert figures["total_steps"] == 1000
    assert figures["step_seconds"] == pytest.approx(60 * 46.3e9 * (1 + 2 * 4 / 12) / 400e12, rel=0.02)
    assert 3e9 < figures["device_bytes"] < 6e9
    assert not torch.distributed.is_initialized()


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    flags = ["--ranks", "8", "--device-gb", "16", "--model.backbone", "vitg14", "--model.finetune", "all"]
    with pytest.raises(ValueError, match=r"a rank needs .* --engine\.") as refused:
        main(["gsv_cities_vitb", *flags])
    assert len(str(refused.value).splitlines()) == 1
    # What it advises fits, in truth: with these settings nothing is refused.
    config = recipe(model={"backbone": "vitg14", "finetune": "all"}, engine={"precision": "bf16"})
    assumed = Assumed(ranks=8, device_gb=16, tflops=1)
    planned = plan(config, assumed)
    assert shortfall(planned)
    words = advice(planned).split(" needs ")[0].split()
    assert not shortfall(plan(parse_flags(Recipe, words, prog="plan", default=config), assumed))


def test_places_that_ranks_cannot_share_are_refused() -> None:
    assumed = Assumed(ranks=7, device_gb=80)
    with pytest.raises(ValueError, match="64 is not divisible by 7 ranks; nearest: 63 or 70"):
        plan(recipe(), assumed)


def test_what_feeds_a_node_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    flags = ["--ranks", "16", "--device-gb", "80", "--tflops", "400", "--json", str(file)]
    shards = ["--data.shards", str(tmp_path / "none"), "--data.places-per-batch", "64"]
    assert main(["gsv_cities_vitb", *shards, *flags]) == 0
    figures = json.loads(file.read_text())
    assert figures["feeding/ranks_of_node"] == 8
    assert figures["feeding/images_s"] == pytest.approx(8 * 64 * 4 / 16 / figures["step_seconds"])
    assert figures["feeding/cores"] == pytest.approx(figures["feeding/images_s"] / figures["feeding/core_images_s"])
    assert 15 < figures["feeding/gb_s"] / figures["feeding/images_s"] * 1e6 < 60  # kB of an image
    assert figures["feeding/full_node_cores"] == pytest.approx(24_000 / figures["feeding/core_images_s"])
    per_image = figures["feeding/gb_s"] / figures["feeding/images_s"]
    assert figures["feeding/full_node_gb_s"] == pytest.approx(24_000 * per_image)
    said = capsys.readouterr().out
    assert "feeding: 8 rank(s) of a node take" in said
    assert "feeding: 8 GPUs of a node at 3,000 images/s each take 24,000 images/s: " in said


def test_a_full_node_is_reckoned_where_the_seconds_of_a_step_are_not_known() -> None:
    on_gpus = Assumed(ranks=8, device_gb=80)
    lines = list(summary_lines(plan(recipe(), on_gpus)))
    assert any("give --tflops" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("feeding: ")]
    assert "8 GPUs of a node at 3,000 images/s each take 24,000 images/s: " in line
    assert " GB/s" in line
    (line,) = [line for line in summary_lines(plan(recipe(data={"decode": "nvjpeg"}), on_gpus)) if "feeding" in line]
    assert "which its GPUs decode" in line


@pytest.mark.parametrize(("ranks", "times"), [(1, "1.00"), (2, "1.00"), (4, "1.00"), (8, "2.00"), (16, "4.00")])
def test_a_stream_says_how_often_tars_are_read(ranks: int, times: str) -> None:
    config = recipe(data={"access": "stream", "composition": "mixed", "places_per_batch": 64})
    line = stream_line(config, ranks, 1e9)
    assert f"is read {times} times over all ranks" in line
    assert ("make data.stream_lanes" in line) == (ranks > 4)


def test_grids_are_counted_as_augmentation_makes_them() -> None:
    assert len(randaugment_of(2, 9).draw_batch([0], 28, 28).warps) == GRIDS
