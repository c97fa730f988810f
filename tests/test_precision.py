"""Training in 16 bits on the CPU, beside the golden curve at each ZeRO stage; and with compiled blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from configs.registry import BACKBONES
from model.backbone import build_backbone
from model.network import PlaceModel
from tests.curves import FOLDER, PILLOW, curve, folder_of_trainings
from tests.pretend_step import recipe_of, steps_on_cpu
from tests.ranks import on_ranks
from tests.town_shards import town_recipe, wait_for_the_town

pytestmark = pytest.mark.slow

STEPS = 7  # after which the rate of a training of so many steps is no longer that of the golden curve's


def check_bf16_follows_the_golden_curve_at_every_stage() -> None:
    """bf16 keeps 8 bits. The bounds are of a step and of the mean; a step is off by most where a pair crosses the
    miner's edge. Also beside each other: at all stages the same numbers are rounded, in sums of another order.
    """
    wait_for_the_town()
    stages = {1: (1,), 2: (2, 3)}[dist.get_world_size()]
    short = {"max_steps": STEPS}
    with folder_of_trainings() as folder:
        found = {
            stage: curve(
                folder,
                f"bf16-{stage}",
                town_recipe(engine={"precision": "bf16", "zero_stage": stage}, trainer=short),
            )
            for stage in stages
        }
        exact = curve(folder, "fp32", town_recipe(trainer=short)) if PILLOW < 13 else []  # draws other pixels
    golden = np.array(exact or json.loads((FOLDER / "town.json").read_text())[:STEPS])[:, 0]
    for stage, values in found.items():
        off = np.abs(np.array(values)[:, 0] / golden - 1)
        print(stage, off.max(), off.mean())
        assert len(off) == STEPS
        assert off.max() < 2e-3, (stage, off)
        assert off.mean() < 5e-4, (stage, off)
        assert off.max() > 1e-5, "nothing was rounded"


def check_loss_and_gradient_are_float32_whatever_the_network_s_precision() -> None:
    steps = steps_on_cpu(recipe_of(engine={"zero_stage": 1, "precision": "bf16"}))
    seen: list[torch.dtype] = []
    loss = steps.step.loss

    def watched(descriptors_BD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = loss(descriptors_BD, *args, **kwargs)
        seen.extend((descriptors_BD.dtype, out.loss.dtype))
        descriptors_BD.register_hook(lambda grad: seen.append(grad.dtype))
        return out

    steps.step.loss = watched  # type: ignore[assignment]
    assert steps.next().updated
    assert seen == [torch.float32] * 3
    assert steps.state.model.dtype == torch.bfloat16
    assert steps.state.queue.descriptors_mD.dtype == torch.float32


test_on_ranks = on_ranks(__file__, world_sizes=(1, 2))


@pytest.fixture
def rank_alone(single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the only rank, as DeepSpeed looks for it."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp16_scales_the_loss_and_skips_what_overflows(
    zero_stage: int, rank_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed has fp16 on few CPUs and torch on all, so the test says that this one has it.

    Within 2 % of fp32: fp16 keeps 11 bits.
    """
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True, raising=False)
    exact = steps_on_cpu(recipe_of(engine={"zero_stage": zero_stage}))
    steps = steps_on_cpu(recipe_of(engine={"zero_stage": zero_stage, "precision": "fp16"}))
    assert steps.state.model.dtype == torch.float16
    optimizer = steps.state.engine.optimizer
    for _ in range(2):
        outcome = steps.next()
        assert outcome.updated
        assert outcome.loss == pytest.approx(exact.next().loss, rel=0.02)
    scale = optimizer.loss_scaler.cur_scale
    assert scale >= 2.0**10
    optimizer.loss_scaler.cur_scale = 2.0**40
    held = len(steps.state.queue)
    outcome = steps.next()
    assert not outcome.updated
    assert np.isfinite(outcome.loss)
    assert len(steps.state.queue) == held


class Counting:
    """A backend of torch.compile that counts what it compiles and runs it as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes inductor's place in trainings."""
        self.graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        compile_blocks = PlaceModel.compile_blocks
        monkeypatch.setattr(PlaceModel, "compile_blocks", lambda model: compile_blocks(model, self))

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


def test_blocks_are_compiled_to_three_graphs_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen blocks, the first trained one (its input has no gradient), and the others; and none anew for a batch of
    the same size. In evaluation nothing is compiled.
    """
    counting = Counting(monkeypatch)
    model = build_backbone(replace(BACKBONES.get("tiny14"), depth=12))
    model.num_frozen_blocks = 6
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    images_B3HW = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    expected_BTC = model.train()(images_B3HW)
    model.compile_blocks(counting)  # type: ignore[arg-type]
    for _ in range(3):
        found_BTC = model(images_B3HW)
        found_BTC.sum().backward()
    assert len(counting.graphs) == 3
    assert torch.equal(found_BTC, expected_BTC)
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(images_B3HW), expected_BTC)
    assert len(counting.graphs) == 3


def test_a_compiled_training_resumes_as_an_eager_one(
    rank_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint says nothing of what was compiled: the bits of an eager training, as the graphs are run eagerly."""
    counting = Counting(monkeypatch)
    steady = {"schedule": "none"}

    def part(name: str, steps: int, compiled: bool, *, resume: bool = False) -> list[list[float]]:
        recipe = town_recipe(optim=steady, trainer={"max_steps": steps}, engine={"compile": compiled})
        return curve(tmp_path, name, recipe, resume=resume)

    straight = part("straight", 4, compiled=False)
    assert not counting.graphs
    part("compiled", 2, compiled=True)
    assert len(counting.graphs) == 3
    assert part("compiled", 4, compiled=False, resume=True) == straight
    assert len(counting.graphs) == 3
