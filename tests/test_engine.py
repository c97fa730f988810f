"""DeepSpeed as the project sets it up: its stages agree, and its optimizer state moves between them."""

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.schema import EngineConfig, OptimConfig
from tests.ranks import on_ranks

IMAGES = 8


def build(stage: int, name: str, precision: str = "fp32", chunks: int = 1) -> Any:
    from trainer.engine import build_engine

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 5)
    )
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    engine = EngineConfig(zero_stage=stage, precision=precision, gradient_accumulation=chunks)
    optim = OptimConfig(name=name, lr=1e-2, weight_decay=0.05)
    return build_engine(model, engine=engine, optim=optim, images_per_rank=IMAGES // dist.get_world_size())


def step(engine: Any, number: int) -> float:
    """One step on this rank's part of a seeded batch; the global loss before it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(IMAGES, 6, generator=generator), torch.randn(IMAGES, 5, generator=generator)
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    x = x[mine].to(next(engine.module.parameters()).dtype)
    loss = F.mse_loss(engine(x).float(), y[mine])
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / world


def check_stages_agree_and_their_state_moves_between_them() -> None:
    """Steps 0-2 at one stage, saved, steps 3-5 at each other: the losses of the run that stayed."""
    from trainer.optimizer_state import load_optimizer, save_optimizer

    holder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(holder)
    folder = Path(holder[0])
    cases = [("adamw", "fp32", (0, 1, 2)), ("sgd", "fp32", (0, 1)), ("adam", "fp32", (0, 2)), ("adamw", "bf16", (1, 2))]
    for name, precision, stages in cases:
        saved, straight = {}, []
        for stage in stages:
            engine = build(stage, name, precision)
            losses = [step(engine, number) for number in range(3)]
            saved[stage] = folder / f"{name}-{precision}-{stage}"
            saved[stage].mkdir(exist_ok=True)
            dist.barrier()
            save_optimizer(engine, saved[stage])
            weights = {key: value.detach().float().clone() for key, value in engine.module.state_dict().items()}
            straight.append(losses + [step(engine, number) for number in range(3, 6)])
            dist.barrier()
            # float32 in another order; bf16 gradients are rounded to 2^-8 before they are summed
            tolerance = 1e-5 if precision == "fp32" else 1e-2
            assert torch.allclose(torch.tensor(straight[-1]), torch.tensor(straight[0]), rtol=tolerance), straight
        for source, target in itertools.product(stages, stages):
            engine = build(target, name, precision)
            load_optimizer(engine, saved[source], weights, lambda e=engine: e(torch.zeros_like(e.module[0].weight[:1])))
            went_on = [step(engine, number) for number in range(3, 6)]
            expected = straight[stages.index(source)][3:]
            assert torch.allclose(torch.tensor(went_on), torch.tensor(expected), rtol=tolerance), (name, source, target)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def check_chunks_add_up_in_the_engine() -> None:
    """Two chunks of half a batch's loss each, unscaled, step as the whole batch does."""
    world = dist.get_world_size()
    whole, chunked = build(1, "sgd"), build(1, "sgd", chunks=2)
    x = torch.randn(IMAGES // world, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    whole.backward(whole(x).square().sum())
    whole.step()
    for part in x.tensor_split(2):
        chunked.backward(chunked(part).square().sum(), scale_wrt_gas=False)
        chunked.step()
    for one, other in zip(whole.module.parameters(), chunked.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole.module[2].weight, build(1, "sgd").module[2].weight)


test_on_ranks = on_ranks(__file__)
