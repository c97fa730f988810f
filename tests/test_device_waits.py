"""What the host waits for in a training step, by line, on the pretend device; and that the step computes the same."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.registry import AGGREGATORS, LOSSES, MINERS
from configs.schema import EvalConfig, LossConfig, MemoryConfig, ModelConfig, RerankConfig
from data_pipeline.augment import image_seeds, randaugment, randaugment_of
from data_pipeline.images import normalise
from eval.describer import Describer
from eval.extract import extract
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.photo_list import list_source
from eval.rerank import rerank
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue
from model.network import build_model
from tests.indexes import tiny
from tests.networks import AGGREGATORS as SMALL
from tests.photos import write_blurred_noise
from tests.pretend_device import HERE, Device, moved
from tests.pretend_step import Steps, pretend_training_device, recipe_of, steps_elsewhere, steps_on_cpu
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

READ = "trainer/step.py: read = torch.cat([numbers, sums.double()]).tolist()"
NORM = "trainer/engine.py: norm = float(total)"
DEEPSPEED = "trainer/engine.py: engine.step()"  # whether the gradient overflowed, and the norm of its groups
NCA = "memory/losses.py: return [Term((tile.anchor_weight_A * loss_A)[counted_A].sum(), counted_A.sum())]"
NCA_BACK = "memory/tiled_loss.py: grad_AP, grad_AR = torch.autograd.grad("
BUDGET = {  # of a step after the first, by engine.zero_stage
    0: {READ: 1, NORM: 1},
    1: {READ: 1, DEEPSPEED: 5},
    2: {READ: 1, DEEPSPEED: 5},
}


OF_TWO_SETS = {
    **{"composition": "sets", "shards": "data/shards"},
    **{"sets": {"a": "x", "b": "y"}, "set_places": {"a": 4, "b": 2}},
}


def waits_of_a_step(steps: Steps, device: Device, count: int = 3) -> tuple[Counter[str], list[tuple[float, float]]]:
    """Waits of the last step by line, and loss and gradient norm of each."""
    found = []
    for _ in range(count):
        device.forget()
        outcome = steps.next()
        assert outcome.grad_norm is not None
        found.append((outcome.loss, outcome.grad_norm))
        assert outcome.votes == [vote * dist.get_world_size() for vote in (1.0, 0.0, 2.0)]
    return device.by_code(), found


def check_a_step_waits_as_often_as_budgeted_and_computes_what_it_does_on_the_cpu() -> None:
    """Tolerance 1e-4: attention takes another kernel there, and Adam amplifies its rounding."""
    for zero_stage, budget in BUDGET.items():
        recipe = recipe_of(engine={"zero_stage": zero_stage}, memory={"placement": "sharded"})
        on_cpu = steps_on_cpu(recipe)
        expected = [(one.loss, one.grad_norm) for one in (on_cpu.next() for _ in range(3))]
        model = build_model(recipe.model)
        with pretend_training_device() as device:
            waits, found = waits_of_a_step(steps_elsewhere(recipe, model), device)
            assert waits == budget, device.table()
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=f"ZeRO {zero_stage}")


def check_no_setting_adds_a_wait() -> None:
    settings: list[dict[str, dict[str, Any]]] = [
        {"memory": {"in_batch": "detached"}, "engine": {"encode_chunks": 3}},
        {"memory": {"decay": "measured", "drift_every": 5, "drift_images": 4}},
        {"memory": {"size": 0}, "data": {"augmentation": "none"}, "loss": {"name": "ContrastiveLoss"}},
        {"memory": {"min_negative_m": 500}},
        {"data": OF_TWO_SETS, "memory": {"placement": "sharded", "min_negative_m": 500}},
        {"data": OF_TWO_SETS, "memory": {"queue_over": "all"}},
        {"engine": {"activation_checkpointing": True}},
        {"trainer": {"log_negatives_every": 4}},
        {"loss": {"guided_weight": 0.5}, "model": {"finetune_last_n_blocks": 2}, "engine": {"encode_chunks": 2}},
    ]
    for changes in settings:
        recipe = recipe_of(**changes)
        model = build_model(recipe.model)
        with pretend_training_device() as device:
            waits, _ = waits_of_a_step(steps_elsewhere(recipe, model), device)
            assert waits == BUDGET[0], f"{changes}\n{device.table()}"


def check_no_loss_or_miner_waits_if_the_plan_is_known() -> None:
    """But NCA: it leaves out anchors without a positive by a mask, forward and backward, in each tile."""
    generator = torch.Generator().manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, (loss, miner) in enumerate(itertools.product(LOSSES, MINERS)):
        in_batch, placement = ("live", "detached")[number % 2], ("replicated", "sharded")[number // 2 % 2]
        memory = MemoryConfig.model_validate({"size": 40, "placement": placement, "in_batch": in_batch})
        with pretend_training_device() as device:
            queue = MemoryQueue(40, 16, HERE, placement=memory.placement)
            global_loss = GlobalLoss(LossConfig(name=loss, miner=miner), memory)
            for step in range(2):
                rows_ND = F.normalize(torch.randn(12 * world, 16, generator=generator), dim=1)
                ids_N = torch.randint(0, 5, (12 * world,), generator=generator)
                own = slice(12 * rank, 12 * (rank + 1))
                rows_BD = rows_ND[own].to(HERE).requires_grad_()
                device.forget()
                out = global_loss(rows_BD, ids_N[own], queue, step=step, place_ids_N=ids_N)
                torch.autograd.grad(out.loss, rows_BD)
                queue.enqueue(out.descriptors_ND, out.place_ids_N, step, host_ids_N=out.host_ids_N)
            allowed = {NCA: 1, NCA_BACK: 1} if loss == "NCALoss" else {}
            assert device.by_code() == allowed, f"{loss} {miner} {in_batch} {placement}\n{device.table()}"


test_on_ranks = on_ranks(__file__, world_sizes=(1, 2))


def test_losses_of_the_library_run_too(single_process: None) -> None:
    """What waits there is pytorch-metric-learning's."""
    with pretend_training_device() as device:
        queue = MemoryQueue(40, 16, HERE)
        global_loss = GlobalLoss(LossConfig(name="SupConLoss", miner="none"), MemoryConfig(size=40))
        ids_N = torch.arange(12) // 3
        for step in range(2):
            rows_BD = F.normalize(torch.randn(12, 16), dim=1).to(HERE).requires_grad_()
            device.forget()
            out = global_loss(rows_BD, ids_N, queue, step=step, place_ids_N=ids_N)
            torch.autograd.grad(out.loss, rows_BD)
            queue.enqueue(out.descriptors_ND, out.place_ids_N, step, host_ids_N=out.host_ids_N)
        assert {wait.file for wait in device.waits} <= {"memory/library_loss.py", "tests/test_device_waits.py"}


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_no_aggregator_waits(aggregator: str) -> None:
    config = ModelConfig.model_validate(
        {"backbone": "tiny14", "weights": "random", "aggregator": aggregator, "aggregator_args": SMALL[aggregator]}
    )
    model = build_model(config.model_copy(update={"finetune": "all"}))
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    with pretend_training_device() as device:
        moved(model)
        for _ in range(2):
            device.forget()
            descriptors_BD = model(normalise(images.pin_memory().to(HERE, non_blocking=True)))
            descriptors_BD.sum().backward()
        assert not device.waits, device.table()


def test_augmentation_waits_for_nothing_and_is_that_of_the_cpu() -> None:
    images = torch.randint(0, 256, (60, 3, 28, 28), dtype=torch.uint8)
    seeds = image_seeds(1, 2, torch.arange(60), torch.arange(60))
    expected = randaugment(images, seeds, num_ops=3, magnitude=15)
    transform = randaugment_of(3, 15)
    drawn = transform.draw_batch(seeds, 28, 28)
    with pretend_training_device() as device:
        found = transform.apply(images.pin_memory().to(HERE, non_blocking=True), drawn)
        assert not device.waits, device.table()
        assert torch.equal(found.cpu(), expected)


def test_features_and_matches_are_those_of_the_cpu(single_process: None, tmp_path: Path) -> None:
    """Extraction, matching with geometry and the merge of ranks, beside the CPU: descriptors within 1e-5."""
    paths = write_blurred_noise(tmp_path, 4, (60, 45))
    config = EvalConfig(image_size=56, batch_size=4, rerank=RerankConfig(saliency_thresh=None, top_k=3))
    model = build_model(ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)).eval()
    order = np.array([[(i + j) % 4 for j in range(4)] for i in range(4)])
    similarities = np.tile(np.linspace(1, 0.5, 4, dtype=np.float32), (4, 1))

    def both(device: torch.device, name: str) -> tuple[np.ndarray, np.ndarray]:
        features = extract(model, paths, config, tmp_path / name, key="same")
        return features.descriptors(), rerank(features, features, order, similarities, config.rerank, device).scores_QT

    expected = both(torch.device("cpu"), "cpu")
    with pretend_training_device() as device:
        moved(model)
        found = both(HERE, "elsewhere")
        by_file = Counter(wait.file for wait in device.waits)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1)  # a match on the threshold may flip
    assert by_file["eval/extract.py"] <= 10, device.table()  # of one batch: what is stored comes back


def test_an_index_is_built_and_asked_as_on_the_cpu(single_process: None, tmp_path: Path) -> None:
    """Search, matching and the order of both stages: the same photographs, cosines within 1e-5."""
    (tmp_path / "database").mkdir()
    paths = write_blurred_noise(tmp_path / "database", 5, (60, 45))

    def located(describer: Describer, name: str) -> tuple[list[list[int]], list[list[float]]]:
        build_index(describer, list_source(str(tmp_path / "database")), tmp_path / name)
        index = Index.open(tmp_path / name, network=describer)
        found = [location.candidates for location in index.locate(paths[:2], top_k=3)]
        return [[one.number for one in row] for row in found], [[one.similarity for one in row] for row in found]

    expected = located(tiny(), "cpu.index")
    describer = tiny()
    with pretend_training_device() as device:
        moved(describer.model)
        found = located(describer, "elsewhere.index")
        assert {"eval/encode.py", "eval/matching.py"} <= {wait.file for wait in device.waits}, device.table()
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
