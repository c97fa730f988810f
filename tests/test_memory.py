"""The loss and gradient of 1, 2 and 4 ranks equal one process with the whole batch, and pytorch-metric-learning."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import CrossBatchMemory, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from configs.schema import LossConfig, MemoryConfig
from memory.gather import all_gather, all_gather_with_grad
from memory.global_loss import global_loss
from memory.losses import mine_multi_similarity, multi_similarity_loss
from memory.queue import MemoryQueue
from tests.ranks import on_ranks

LOSS = LossConfig(alpha=1.0, beta=50.0, base=0.0, epsilon=0.1)
PLACES, VIEWS, IN, OUT = 12, 4, 11, 7
N = PLACES * VIEWS


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seeded inputs [N, IN] whose images of a place are alike, with place ids that recur between steps."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(31, IN, generator=generator, dtype=torch.float64)
    out = []
    for _ in range(steps):
        places = torch.randperm(31, generator=generator)[:PLACES].repeat_interleave(VIEWS)
        out.append(
            ((centres[places] + 0.8 * torch.randn(N, IN, generator=generator, dtype=torch.float64)).to(dtype), places)
        )
    return out


def projection(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(IN, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def train(
    memory: MemoryConfig, steps: int, dtype: torch.dtype = torch.float64
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and parameter gradients of plain SGD on a linear map, the batch split over ranks, gradients averaged."""
    rank, world = dist.get_rank(), dist.get_world_size()
    weight = projection(dtype).requires_grad_()
    queue = MemoryQueue(memory.size, OUT).to(dtype)
    losses, gradients = [], []
    for step, (x, places) in enumerate(batches(steps, dtype)):
        mine = slice(rank * N // world, (rank + 1) * N // world)
        out = global_loss(
            F.normalize(x[mine] @ weight, dim=1), places[mine], queue, step=step, loss=LOSS, memory=memory
        )
        (gradient,) = torch.autograd.grad(out.loss, weight)
        total = out.loss.detach().clone()
        for tensor in (gradient, total):
            dist.all_reduce(tensor)
            tensor /= world
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
        with torch.no_grad():
            weight -= 0.05 * gradient
        losses.append(total.item())
        gradients.append(gradient)
    return losses, gradients


def reference(memory: MemoryConfig, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """The same in one process by pytorch-metric-learning; with decay, by the formula over its mined pairs."""
    weight = projection().requires_grad_()
    bank = torch.zeros(0, OUT, dtype=torch.float64)
    bank_places = torch.zeros(0, dtype=torch.int64)
    bank_steps = torch.zeros(0, dtype=torch.int64)
    losses, gradients = [], []
    for step, (x, places) in enumerate(batches(steps)):
        descriptors = F.normalize(x @ weight, dim=1)
        references, reference_places = torch.cat([descriptors, bank]), torch.cat([places, bank_places])
        pairs = MultiSimilarityMiner(LOSS.epsilon)(descriptors, places, references.clone(), reference_places)
        a1, p, a2, n = lmu.remove_self_comparisons(pairs, torch.arange(N), len(references))
        if memory.decay_lambda == 0:
            ms = MultiSimilarityLoss(alpha=LOSS.alpha, beta=LOSS.beta, base=LOSS.base)
            loss = ms(descriptors, places, (a1, p, a2, n), references, reference_places)
        else:
            similarity = descriptors @ references.T
            weights = torch.cat(
                [torch.ones(N).double(), torch.exp(-memory.decay_lambda * (step - bank_steps).double())]
            )
            pull = torch.zeros(N, dtype=torch.float64).index_add(0, a1, torch.exp(-LOSS.alpha * similarity[a1, p]))
            push = torch.zeros(N, dtype=torch.float64).index_add(
                0, a2, weights[n] * torch.exp(LOSS.beta * similarity[a2, n])
            )
            loss = (torch.log1p(pull) / LOSS.alpha + torch.log1p(push) / LOSS.beta).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        bank = torch.cat([bank, descriptors.detach()])[-memory.size :] if memory.size else bank
        bank_places = torch.cat([bank_places, places])[-memory.size :] if memory.size else bank_places
        bank_steps = torch.cat([bank_steps, torch.full((N,), step)])[-memory.size :] if memory.size else bank_steps
        with torch.no_grad():
            weight -= 0.05 * gradient
        losses.append(loss.item())
        gradients.append(gradient)
    return losses, gradients


def assert_same(memory: MemoryConfig) -> None:
    losses, gradients = train(memory, steps=6)
    expected_losses, expected_gradients = reference(memory, steps=6)
    # float64 throughout; sums of at most N + M terms in another order differ by a few hundred ulp (2e-16) at most.
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


def check_no_queue_equals_library() -> None:
    assert_same(MemoryConfig(size=0, decay_lambda=0.0))


def check_queue_without_decay_equals_library() -> None:
    assert_same(MemoryConfig(size=101, decay_lambda=0.0))


def check_queue_with_decay_equals_formula() -> None:
    assert_same(MemoryConfig(size=101, decay_lambda=0.3))


def check_batch_larger_than_queue() -> None:
    assert_same(MemoryConfig(size=13, decay_lambda=0.1))


def check_float32_within_rounding() -> None:
    memory = MemoryConfig(size=101, decay_lambda=0.1)
    losses, _ = train(memory, steps=6, dtype=torch.float32)
    assert losses == pytest.approx(reference(memory, steps=6)[0], rel=1e-4)  # beta 50 times float32's 6e-8, 6 steps


def check_gather_backward_sums_over_ranks() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    local = torch.full((3, 2), float(rank), requires_grad=True)
    gathered = all_gather_with_grad(local)
    assert gathered[:, 0].tolist() == [float(r) for r in range(world) for _ in range(3)]
    (gathered * (rank + 1)).sum().backward()
    assert local.grad is not None
    assert torch.equal(local.grad, torch.full((3, 2), world * (world + 1) / 2))
    assert all_gather(torch.tensor([rank])).tolist() == list(range(world))


test_on_ranks = on_ranks(__file__)


def test_equals_cross_batch_memory_values() -> None:
    """Loss values with decay_lambda 0 are CrossBatchMemory's own, which enqueues first and detaches references."""
    library = CrossBatchMemory(
        MultiSimilarityLoss(alpha=LOSS.alpha, beta=LOSS.beta, base=LOSS.base),
        OUT,
        memory_size=3 * N,
        miner=MultiSimilarityMiner(LOSS.epsilon),
    ).double()
    expected, weight = [], projection()
    ours = []
    queue = MemoryQueue(2 * N, OUT).double()  # the library's queue holds the current batch as well
    for step, (x, places) in enumerate(batches(7)):
        descriptors = F.normalize(x @ weight, dim=1)
        expected.append(library(descriptors, places).item())
        entries, ids, _ = queue.entries()
        similarity = descriptors @ torch.cat([descriptors, entries]).T
        same = places[:, None] == torch.cat([places, ids])
        positive = same.clone().fill_diagonal_(False)

        kept = mine_multi_similarity(similarity, positive, ~same, LOSS.epsilon)
        loss = multi_similarity_loss(
            similarity, *kept, torch.zeros(similarity.shape[1]), alpha=LOSS.alpha, beta=LOSS.beta, base=LOSS.base
        )
        ours.append(loss.mean().item())
        queue.enqueue(descriptors, places, step)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_loss_is_finite_where_plain_exp_overflows() -> None:
    similarity = torch.tensor([[0.2, 1.0]])
    mask = torch.tensor([[True, False]])
    loss = multi_similarity_loss(similarity, mask, ~mask, torch.zeros(2), alpha=1.0, beta=500.0, base=0.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.2)) + 1.0, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 40), batches=st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_queue_is_first_in_first_out(size: int, batches: list[int]) -> None:
    queue = MemoryQueue(size, 1)
    stored: list[tuple[int, int, int]] = []
    for step, n in enumerate(batches):
        values = torch.arange(n) + 1000 * step
        queue.enqueue(values[:, None].float(), values, step)
        stored = (stored + [(v, v, step) for v in values.tolist()])[-size:] if size else []
    descriptors, ids, steps = queue.entries()
    held = sorted(zip(descriptors[:, 0].int().tolist(), ids.tolist(), steps.tolist(), strict=True))
    assert held == sorted(stored)
    assert len(queue) == len(stored)


def test_queue_state_continues_where_it_was() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 9, 3, generator=generator)
    straight, before, after = MemoryQueue(20, 3), MemoryQueue(20, 3), MemoryQueue(20, 3)
    for step in range(5):
        straight.enqueue(rows[step], torch.arange(9), step)
    for step in range(3):
        before.enqueue(rows[step], torch.arange(9), step)
    after.load_state_dict(before.state_dict())
    for step in range(3, 5):
        after.enqueue(rows[step], torch.arange(9), step)
    for a, b in zip(straight.entries(), after.entries(), strict=True):
        assert torch.equal(a, b)
