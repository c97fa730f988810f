"""Decay, drift, gradient cache, and input at the edge of what a loss is defined for."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.registry import MINERS
from configs.schema import LossConfig, MemoryConfig
from memory.decay import exponential_log_weight, half_life, measured_log_weight
from memory.drift import DriftProbe
from memory.global_loss import GlobalLoss
from memory.gradient_cache import GradientCache
from memory.queue import MemoryQueue
from tests.ranks import on_ranks

NAMES = ("MultiSimilarityLoss", "TripletMarginLoss", "ContrastiveLoss", "NCALoss")


def check_drift_is_the_same_at_any_world_size() -> None:
    """The probe keeps the images that one process would keep, and measures the cosine of stored and present."""
    rank, world = dist.get_rank(), dist.get_world_size()
    probe = DriftProbe(every=2, num_images=6, queue_steps=5, image_shape=(3, 2, 2), descriptor_size=3)

    def encode(images: torch.Tensor, turn: float) -> torch.Tensor:
        plain = F.normalize(images.double().flatten(1)[:, :3], dim=1)
        return F.normalize(plain + turn * plain.roll(1, 1), dim=1)

    curves = []
    for step in range(9):
        images = torch.randint(1, 255, (8, 3, 2, 2), generator=torch.Generator().manual_seed(step)).to(torch.uint8)
        turn = 0.1 * step
        if probe.due(step):
            curves.append(probe.measure(lambda x, turn=turn: encode(x, turn), step))
        probe.keep(images[rank * 8 // world : (rank + 1) * 8 // world], encode(images, turn), step)
    assert list(curves[-1]) == ["drift_age_000002", "drift_age_000004", "drift_age_000006"]
    for name, cosine in curves[-1].items():
        then = 8 - int(name[-6:])
        images = torch.randint(1, 255, (8, 3, 2, 2), generator=torch.Generator().manual_seed(then)).to(torch.uint8)
        kept = images[[0, 4]]  # 6 images over 3 ages
        expected = (encode(kept, 0.1 * then) * encode(kept, 0.8)).sum(1).mean()
        assert cosine == pytest.approx(expected.item(), abs=1e-6)
    assert 1 > curves[-1]["drift_age_000002"] > curves[-1]["drift_age_000006"]
    other = DriftProbe(every=2, num_images=6, queue_steps=5, image_shape=(3, 2, 2), descriptor_size=3)
    other.load_state_dict(probe.state_dict())
    assert other.measure(lambda x: encode(x, 0.9), 9) == probe.measure(lambda x: encode(x, 0.9), 9)


def check_chunks_give_the_gradient_of_the_whole_batch() -> None:
    """With the queue on, dropout on, and chunks of unequal size; activations of one chunk are held at a time."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    images = torch.randn(7, 6, dtype=torch.float64)
    ids = torch.randint(0, 4, (7,))
    model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 5)).double()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    queue = MemoryQueue(11, 5).double()
    generator = torch.Generator().manual_seed(9)
    queue.enqueue(
        F.normalize(torch.randn(11, 5, generator=generator, dtype=torch.float64), dim=1), torch.arange(11) % 4, 0
    )
    global_loss = GlobalLoss(LossConfig(), MemoryConfig(size=11))

    def encode(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(model(x), dim=1)

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    chunks = images.tensor_split(3)
    torch.manual_seed(100 + rank)
    whole = global_loss(torch.cat([encode(chunk) for chunk in chunks]), ids, queue, step=3)
    whole.loss.backward()
    expected = gradients()

    held: list[int] = []
    torch.manual_seed(100 + rank)
    cache = GradientCache(lambda x: (encode(x),), chunks)
    out = global_loss(cache.outputs[0], ids, queue, step=3)
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (held.append(len(x)) if x.ndim else None, x)[1], lambda x: x
    ):
        cache.backward(out.loss, lambda part: part.backward())
    assert torch.equal(torch.get_rng_state(), state)
    assert max(n for n in held if n not in (6, 32, 5)) <= 3  # rows of saved activations: never the batch's 7
    assert out.loss.item() == whole.loss.item()
    for found, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


test_on_ranks = on_ranks(__file__)


@settings(max_examples=60)
@given(decay=st.floats(0, 5), age=st.integers(0, 10_000))
def test_exponential_decay(decay: float, age: int) -> None:
    log_weight = exponential_log_weight(torch.tensor([float(age)], dtype=torch.float64), decay)
    assert log_weight.exp().item() == pytest.approx(math.exp(-decay * age))
    if decay > 1e-3:
        half = half_life(MemoryConfig(decay_lambda=decay), torch.zeros(0, 2))
        assert math.exp(-decay * half) == pytest.approx(0.5)


def test_measured_decay_follows_the_curve() -> None:
    """c^2 by straight lines from 1 at age 0; a point that rises is taken down; flat beyond the last; 1 before any."""
    curve = torch.tensor([[10.0, 0.8], [20.0, 0.9], [30.0, 0.5]], dtype=torch.float64)
    ages = torch.tensor([0.0, 5, 10, 15, 20, 25, 30, 99], dtype=torch.float64)
    expected = [1, 0.9**2, 0.64, 0.64, 0.64, 0.65**2, 0.25, 0.25]
    assert measured_log_weight(ages, curve).exp().tolist() == pytest.approx(expected)
    assert measured_log_weight(ages, curve[:0]).tolist() == [0] * 8
    measured = MemoryConfig(decay="measured", drift_every=10)
    assert half_life(measured, curve) == 24  # (0.8 - 0.03 * 4)^2 = 0.46 is the first below one half
    assert half_life(measured, curve[:1]) == math.inf
    with pytest.raises(ValidationError, match="needs drift_every"):
        MemoryConfig(decay="measured")


def run(
    config: LossConfig, rows: torch.Tensor, ids: list[int], memory: MemoryConfig | None = None, age: int = 1
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, gradient and figures of rows as a batch, after half of them were stored `age` steps ago."""
    memory = memory or MemoryConfig(size=len(rows))
    rows = rows.clone().requires_grad_()
    queue = MemoryQueue(memory.size, rows.shape[1])
    place_ids = torch.tensor(ids)
    queue.enqueue(rows.detach()[::2], place_ids[::2], 5 - age)
    out = GlobalLoss(config, memory)(rows, place_ids, queue, step=5)
    (gradient,) = torch.autograd.grad(out.loss, rows)
    return out.loss.item(), gradient, {name: value.item() for name, value in out.stats.items()}


UNIT = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.parametrize("in_batch", ["live", "detached"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "ids"),
    [
        pytest.param(UNIT, [0, 1, 2, 3, 4, 5], id="no positives in the batch"),
        pytest.param(UNIT, [7] * 6, id="all one place, no negatives"),
        pytest.param(UNIT[:1].repeat(6, 1), [0, 0, 0, 1, 1, 1], id="duplicate images"),
        pytest.param(torch.zeros(6, 4), [0, 0, 1, 1, 2, 2], id="zero vectors"),
        pytest.param(UNIT[:1], [0], id="one image"),
    ],
)
def test_degenerate_batches_are_finite(
    single_process: None, rows: torch.Tensor, ids: list[int], name: str, miner: str, placement: str, in_batch: str
) -> None:
    memory = MemoryConfig(size=len(rows), placement=placement, in_batch=in_batch)
    loss, gradient, figures = run(LossConfig(name=name, miner=miner), rows, ids, memory)
    assert math.isfinite(loss)
    assert gradient.isfinite().all()
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_descriptor_that_is_not_finite_makes_the_loss_nan(single_process: None, name: str, bad: float) -> None:
    rows = UNIT.clone()
    rows[3, 1] = bad
    loss, _, _ = run(LossConfig(name=name), rows, [0, 0, 1, 1, 2, 2], MemoryConfig(size=0))
    assert math.isnan(loss)


def test_no_overflow_where_plain_exp_has_one(single_process: None) -> None:
    """beta 500: exp(500) is infinite in float32, the loss 1 + log terms is not; forgotten entries count for nothing."""
    config = LossConfig(args={"alpha": 1, "beta": 500, "base": 0}, miner="none")
    rows = torch.eye(4)[[0, 0, 0, 0]]
    loss, gradient, _ = run(config, rows, [0, 0, 1, 1])
    assert loss == pytest.approx(1.0 + math.log(1 + 2 * math.exp(-1)), abs=0.01)
    assert gradient.isfinite().all()
    places = torch.tensor([0, 0, 1, 1, 2, 2])
    stale = MemoryQueue(1, 4)
    stale.enqueue(UNIT[:1], torch.tensor([9]), 0)
    memory = MemoryConfig(size=1, decay_lambda=1000.0)
    alone, beside = (
        GlobalLoss(config, memory)(UNIT, places, queue, step=4).loss for queue in (MemoryQueue(1, 4), stale)
    )
    assert beside.item() == pytest.approx(alone.item(), rel=1e-6)


def test_every_loss_forgets_with_age(single_process: None) -> None:
    """A memory negative's part of the loss falls with lambda times its age, down to none."""
    for name in NAMES:
        weights = []
        for decay, age in ((0.0, 3), (0.2, 3), (0.2, 9), (50.0, 9)):
            queue = MemoryQueue(1, 4)
            queue.enqueue(UNIT[2:3] * 0 + UNIT[:1], torch.tensor([5]), 20 - age)
            config = LossConfig(name=name, miner="none")
            out = GlobalLoss(config, MemoryConfig(size=1, decay_lambda=decay))(
                UNIT[:2], torch.tensor([0, 0]), queue, step=20
            )
            weights.append(out.loss.item())
        assert weights == sorted(weights, reverse=True), name
        assert weights[0] > weights[1] > weights[2] > weights[3], name


def test_figures_of_a_small_case(single_process: None) -> None:
    rows = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.2, 1.0]]), dim=1)
    queue = MemoryQueue(8, 2)
    queue.enqueue(rows[[0, 2]], torch.tensor([5, 0]), 3)
    out = GlobalLoss(LossConfig(miner="none"), MemoryConfig(size=8, decay_lambda=0.1))(
        rows, torch.tensor([0, 0, 1, 1]), queue, step=7
    )
    figures = {name: value.item() for name, value in out.stats.items()}
    assert figures["mined_positives"] == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert figures["mined_negatives"] == pytest.approx((3 + 3 + 4 + 4) / 4)
    assert figures["negatives_from_memory"] == pytest.approx(6 / 14)
    assert figures["mined_negative_age"] == pytest.approx(6 * 4 / 14)
    assert figures["trivial_anchors"] == 0
    assert figures["queue_fill"] == 2
    assert figures["queue_effective_size"] == pytest.approx(2 * math.exp(-0.4))
    assert figures["decay_half_life"] == pytest.approx(math.log(2) / 0.1)
    similar = rows @ rows.T
    hardest = [1.0, similar[1, 0], 1.0, similar[3, 2]]  # the stored copies under another place's name
    assert figures["hardest_negative"] == pytest.approx(float(sum(hardest)) / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "MultiSimilarityLos"}, "unknown loss.name 'MultiSimilarityLos'; nearest: MultiSimilarityLoss"),
        ({"miner": "MultiSimilarityMinr"}, "nearest: MultiSimilarityMiner"),
        ({"args": {"betta": 1}}, r"takes no argument 'betta'; nearest: beta \(it takes alpha, beta, base\)"),
        ({"miner": "TripletMarginMiner", "miner_args": {"type_of_triplets": "any"}}, "all, hard, semihard or easy"),
        ({"name": "ProxyNCALoss", "args": {"num_classes": 3, "embedding_size": 4}}, "parameters of its own"),
        ({"name": "FastAPLoss", "args": {"num_bins": 4}, "miner": "none"}, "does not take a reference set"),
    ],
)
def test_a_wrong_name_or_argument_says_what_would_be_right(
    single_process: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalLoss(LossConfig(**changes), MemoryConfig())


def test_a_library_loss_needs_the_whole_queue(single_process: None) -> None:
    with pytest.raises(ValueError, match=r"set memory\.placement replicated"):
        GlobalLoss(LossConfig(name="CircleLoss", miner="none"), MemoryConfig(placement="sharded"))
