"""DeepSpeed as the project sets it up: its stages agree, and its optimizer state moves between them."""

import itertools
import math
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

from configs.schema import EngineConfig, OptimConfig
from tests.ranks import on_ranks, shared_folder

IMAGES = 8


Layout = tuple[int, str]  # ZeRO stage, offload


def build(
    layout: Layout,
    name: str,
    precision: str = "fp32",
    chunks: int = 1,
    timeout_s: int = 60,
    *,
    fused: bool = False,
    overlap: bool = False,
) -> Any:
    from trainer.engine import build_engine, partitioner

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 5)
    )
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    stage, offload = layout
    engine = EngineConfig.model_validate(
        {
            "zero_stage": stage,
            "offload": offload,
            "precision": precision,
            "encode_chunks": chunks,
            "timeout_s": timeout_s,
            "overlap": overlap,
        }
    )
    if part := partitioner(engine):  # as the network is built
        for module in model:
            part(module)
    optim = OptimConfig(name=name, lr=1e-2, weight_decay=0.05)
    images = IMAGES // dist.get_world_size()
    return build_engine(model, engine=engine, optim=optim, images_per_rank=images, fused=fused)


def step(engine: Any, number: int) -> float:
    """One step on this rank's part of a seeded batch; the global loss before it."""
    from trainer.engine import clip_and_update

    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(IMAGES, 6, generator=generator), torch.randn(IMAGES, 5, generator=generator)
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    x = x[mine].to(torch.bfloat16 if engine.bfloat16_enabled() else torch.float32)
    loss = F.mse_loss(engine(x).float(), y[mine])
    engine.backward(loss)
    clip_and_update(engine, 1.0)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / world


def check_stages_agree_and_their_state_moves_between_them() -> None:
    """Steps 0-2 at one stage, saved, steps 3-5 at each other: the losses of the run that stayed."""
    from trainer.engine_state import StoredTensors, put_state, read_numbers, take_state

    folder = shared_folder()
    rank = dist.get_rank()
    cases: list[tuple[str, str, tuple[Layout, ...]]] = [
        ("adamw", "fp32", ((0, "none"), (1, "none"), (2, "optimizer"), (3, "none"), (3, "all"))),
        ("sgd", "fp32", ((0, "none"), (1, "none"), (3, "none"))),
        ("adam", "fp32", ((0, "none"), (2, "none"))),
        ("adamw", "bf16", ((1, "none"), (2, "none"), (3, "none"))),
    ]
    for name, precision, layouts in cases:
        saved, straight, numbers = {}, [], {}
        for layout in layouts:
            engine = build(layout, name, precision)
            losses = [step(engine, number) for number in range(3)]
            saved[layout] = folder / f"{name}-{precision}-{layout[0]}-{layout[1]}"
            saved[layout].mkdir(exist_ok=True)
            state = take_state(engine)
            save_file(state.weights, saved[layout] / f"model-{rank}.safetensors")
            save_file(state.optimizer, saved[layout] / f"optimizer-{rank}.safetensors")
            numbers[layout] = state.numbers
            straight.append(losses + [step(engine, number) for number in range(3, 6)])
            dist.barrier()
            # float32 in another order; bf16 gradients are rounded to 2^-8 before they are summed
            tolerance = 1e-5 if precision == "fp32" else 1e-2
            assert torch.allclose(torch.tensor(straight[-1]), torch.tensor(straight[0]), rtol=tolerance), straight
        for source, target in itertools.pairwise([*layouts, layouts[0]]):
            engine = build(target, name, precision)
            files = [StoredTensors(sorted(saved[source].glob(f"{kind}-*"))) for kind in ("model", "optimizer")]
            blank = torch.zeros(1, 6, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            put_state(engine, *files, read_numbers(numbers[source]), lambda e=engine, x=blank: e(x))
            went_on = [step(engine, number) for number in range(3, 6)]
            expected = straight[layouts.index(source)][3:]
            assert torch.allclose(torch.tensor(went_on), torch.tensor(expected), rtol=tolerance), (name, source, target)
            groups = [group["weight_decay"] for group in engine.optimizer.param_groups]
            assert groups == [0.05, 0.0], (name, source, target)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


def check_fused_adam_trains_as_the_other_does_at_every_stage() -> None:
    """As on GPUs, where it is the default. Tolerance: float32 in another order."""
    for layout in ((0, "none"), (1, "none"), (2, "optimizer"), (3, "none")):
        for name in ("adamw", "adam"):
            engines = [build(layout, name, fused=fused) for fused in (False, True)]
            inner = getattr(engines[1].optimizer, "optimizer", engines[1].optimizer)
            assert inner.param_groups[0]["fused"] is True
            losses = [[step(engine, number) for number in range(4)] for engine in engines]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def check_gradients_reduced_beside_backward_are_those_reduced_after_it() -> None:
    """With and without chunks. Tolerance: buckets have other borders, and with them gloo's order of addition."""
    for stage, chunks in ((1, 1), (1, 2), (2, 1), (2, 2)):
        losses = []
        for overlap in (False, True):
            engine = build((stage, "none"), "adamw", chunks=chunks, overlap=overlap)
            assert engine.optimizer.overlap_comm == overlap
            losses.append([step(engine, number) for number in range(4)])
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def check_groups_that_deepspeed_makes_have_the_recipe_s_timeout() -> None:
    """Left alone they would wait for a lost rank for torch's half an hour."""
    from deepspeed.comm import new_group

    build((1, "none"), "adamw", timeout_s=77)
    group = new_group(list(range(dist.get_world_size())))
    assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 77
    dist.destroy_process_group(group)


def check_gradients_in_bf16_add_up_over_ranks_in_fp32() -> None:
    """256 of one rank and 1 of each other: added up in bf16, 256 + 1 is 256, however many follow."""
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    expected = (256 + world - 1) / world
    for stage in (1, 2, 3):
        engine = build((stage, "none"), "sgd", "bf16")
        out = engine(torch.ones(1, 6, dtype=torch.bfloat16))
        engine.backward((out.float() * (1.0 if rank else 256.0)).sum())
        gradient = safe_get_full_grad(engine.module[4].bias)
        assert (gradient.float() - expected).abs().max() <= expected * 2.0**-8, (stage, gradient)  # of one rounding
        engine.step()


def check_a_gradient_that_is_not_finite_updates_nothing() -> None:
    """NaN in one rank's part of the loss: every rank skips, weights and moments stay, and the next step is a step."""
    from trainer.engine import clip_and_update
    from trainer.engine_state import take_state

    layouts: list[tuple[Layout, str]] = [
        *(((stage, "none"), "fp32") for stage in range(4)),
        *(((stage, "none"), "bf16") for stage in (1, 2, 3)),
    ]
    for layout, precision in layouts:
        engine = build(layout, "adamw", precision)
        step(engine, 0)
        before = take_state(engine)
        x = torch.ones(2, 6, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        poison = float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        engine.backward(engine(x).float().sum() * poison)
        result = clip_and_update(engine, 1.0)
        assert result is not None
        assert not result.updated, (layout, precision)
        assert not math.isfinite(result.norm)
        after = take_state(engine)
        assert after.numbers == before.numbers, (layout, precision)
        for one, other in ((before.weights, after.weights), (before.optimizer, after.optimizer)):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), (layout, precision)
        engine.backward(engine(x).float().sum())
        result = clip_and_update(engine, 1.0)
        assert result is not None
        assert result.updated, (layout, precision)
        assert 0 < result.norm < math.inf


def check_weights_that_are_not_finite_are_found_at_every_stage() -> None:
    """On one rank alone, and weights alone: what fills up the last partition is no weight."""
    from trainer.engine import weights_are_finite

    for stage in (0, 2, 3):
        engine = build((stage, "none"), "adamw")
        bias = engine.module[4].bias  # 5 numbers, which no world of more than one divides
        part = getattr(bias, "ds_tensor", bias.data)
        holder, place = divmod(4, part.numel())  # of its last number
        if stage == 3 and dist.get_rank() >= holder:
            part[place + 1 if dist.get_rank() == holder else 0 :] = math.nan
        assert weights_are_finite(engine), stage
        for value in (math.nan, math.inf, 1e30):  # the square of the last is infinite
            good = part[place].clone()
            part[place] = value if dist.get_rank() == holder else good
            assert not weights_are_finite(engine), (stage, value)
            part[place] = good
        assert weights_are_finite(engine), stage


def check_whole_weights_let_ranks_work_by_themselves() -> None:
    """At ZeRO-3, ranks with unequal numbers of forward passes: the same outputs as before, and training goes on."""
    from trainer.engine import whole_weights

    engine, reference = build((3, "none"), "adamw"), build((1, "none"), "adamw")
    for number in range(2):
        step(engine, number)
        step(reference, number)
        with whole_weights(engine), torch.no_grad():
            for i in range(dist.get_rank() + 1):
                x = torch.full((2, 6), float(i))
                torch.testing.assert_close(engine.module(x), reference.module(x), rtol=1e-5, atol=1e-6)
    assert step(engine, 2) == pytest.approx(step(reference, 2), rel=1e-5)


def check_chunks_add_up_in_the_engine() -> None:
    """Two chunks of half a batch's loss each, unscaled, step as the whole batch does."""
    world = dist.get_world_size()
    whole, chunked = build((1, "none"), "sgd"), build((1, "none"), "sgd", chunks=2)
    x = torch.randn(IMAGES // world, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    whole.backward(whole(x).square().sum())
    whole.step()
    for part in x.tensor_split(2):
        chunked.backward(chunked(part).square().sum(), scale_wrt_gas=False)
        chunked.step()
    for one, other in zip(whole.module.parameters(), chunked.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole.module[2].weight, build((1, "none"), "sgd").module[2].weight)


test_on_ranks = on_ranks(__file__)
