"""The queue: first in, first out, one content over ranks and placements, and its way through a checkpoint."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import LossConfig, MemoryConfig
from memory.gather import all_gather, all_gather_with_grad
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue, Placement
from tests.ranks import on_ranks

SIZE, D = 23, 5


def batch(step: int, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1)
    return rows, torch.randint(0, 6, (n,), generator=generator)


def losses(queue: MemoryQueue, placement: Placement, steps: range) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    global_loss = GlobalLoss(LossConfig(), MemoryConfig(size=SIZE, placement=placement))
    found = []
    for step in steps:
        rows, ids = batch(step)
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        out = global_loss(rows[mine], ids[mine], queue, step=step)
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
        found.append(out.loss.item())
    return found


def saved_by(world_size: int, placement: Placement, steps: int) -> list[dict[str, torch.Tensor]]:
    """State dicts as `world_size` ranks would save them, each cut from the queue of one process by slots r::W."""
    whole = MemoryQueue(SIZE, D).double()
    for step in range(steps):
        whole.enqueue(*batch(step), step)
    state = whole.state_dict()
    if placement == "replicated":
        return [state]
    return [
        {
            **state,
            "descriptors_mD": state["descriptors_mD"][rank::world_size],
            "shard": torch.tensor([rank, world_size]),
        }
        for rank in range(world_size)
    ]


def check_saved_queues_load_at_any_world_size_and_placement() -> None:
    """From 4, 2 or 1 ranks, before fill, at wrap and after, the next losses are those of the run that went on."""
    for steps in (1, 3, 9):
        straight = MemoryQueue(SIZE, D).double()
        whole = losses(straight, "replicated", range(steps + 3))[steps:]
        for saved_placement, saved_world in (("replicated", 4), ("sharded", 4), ("sharded", 2), ("sharded", 1)):
            for placement in ("replicated", "sharded"):
                queue = MemoryQueue(SIZE, D, placement=placement).double()
                queue.load_shards(saved_by(saved_world, saved_placement, steps))
                assert len(queue) == min(SIZE, 8 * steps)
                assert losses(queue, placement, range(steps, steps + 3)) == pytest.approx(whole, rel=1e-12)


def check_a_rank_saves_what_one_process_would_cut() -> None:
    """Ties the cut in `saved_by` to what ranks really hold."""
    queue = MemoryQueue(SIZE, D, placement="sharded").double()
    losses(queue, "sharded", range(5))
    expected = saved_by(dist.get_world_size(), "sharded", 5)[dist.get_rank()]
    for name, tensor in queue.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


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


@settings(max_examples=60)
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


def test_a_saved_queue_that_does_not_fit_says_why() -> None:
    state = MemoryQueue(20, 3).state_dict()
    with pytest.raises(ValueError, match=r"holds 20 descriptors of 3, this one 16 of 3; memory\.size"):
        MemoryQueue(16, 3).load_shards([state])
    with pytest.raises(ValueError, match=r"2 shards, of which \[1\] were given"):
        MemoryQueue(20, 3).load_shards([{**state, "descriptors_mD": torch.zeros(10, 3), "shard": torch.tensor([1, 2])}])
