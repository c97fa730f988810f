"""Loss and gradients over 1, 2 and 4 ranks equal one process with the whole batch, and pytorch-metric-learning."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses, miners

from configs.schema import LossConfig, MemoryConfig
from data_pipeline.utm import on_ellipsoid
from memory.global_loss import GlobalLoss
from memory.near_places import NearPlaces
from memory.queue import MemoryQueue
from memory.strategies import InTiles
from tests.dense_loss import dense_loss
from tests.loss_cases import IN, OUT, LossCase, Stored, draw_images, first_weight, from_rank_0
from tests.ranks import on_ranks

LOSSES = ("MultiSimilarityLoss", "TripletMarginLoss", "ContrastiveLoss", "NCALoss")
MINERS = ("MultiSimilarityMiner", "TripletMarginMiner", "none")
PLACES = 9


@dataclass(frozen=True)
class Case(LossCase):
    """A short training whose every step is compared."""

    size: int = 21
    per_rank: int = 0  # 0: a global batch of 8
    steps: int = 5  # of 8 images: the queue is empty, fills, wraps in the middle of a batch, and again
    decay_lambda: float = 0.3
    engine_reduces: str = "mean"
    tile_bytes: int = 3000
    places: int = PLACES
    seed: int = 1
    dtype: torch.dtype = torch.float64

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Seeded inputs [N, IN]; images of a place are alike, some places have one image alone."""
        generator = torch.Generator().manual_seed(self.seed)
        centres = torch.randn(self.places, IN, generator=generator, dtype=torch.float64)
        n = self.per_rank * dist.get_world_size() or 8
        out = []
        for _ in range(self.steps):
            places = torch.randint(0, self.places, (n,), generator=generator)
            out.append((draw_images(centres, places, generator).to(self.dtype), places))
        return out

    def memory(self) -> MemoryConfig:
        return MemoryConfig(
            size=self.size,
            placement=self.placement,
            in_batch=self.in_batch,
            decay_lambda=self.decay_lambda,
            min_negative_m=self.min_negative_m,
        )

    def points(self) -> torch.Tensor:
        """Where the places are [n, 3], metres from the Earth's centre: in two squares of 150 m, far from each other.

        In steps of 1/8 m, as `NearPlaces` keeps them.
        """
        generator = torch.Generator().manual_seed(self.seed + 100)
        metres = 150 * torch.rand(self.places, 2, generator=generator, dtype=torch.float64)
        lat = 38.7 + metres[:, 0] / 111_000
        lon = torch.where(torch.arange(self.places) % 3 > 0, -9.1, 151.2) + metres[:, 1] / 87_000
        return (torch.from_numpy(on_ellipsoid(lat.numpy(), lon.numpy())) * 8).round() / 8

    def of_one_process(
        self, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, stored: Stored, step: int
    ) -> list[torch.Tensor]:
        """Loss, gradients of the descriptors and of the weight, and the pairs an anchor that are left out."""
        weight = weight.detach().double().requires_grad_()
        descriptors = F.normalize(x.double() @ weight, dim=1)
        ages = [self.decay_lambda * (step - entered) for _, _, entered in stored]
        batch = self.batch(descriptors, ids, stored, ages, self.points())
        loss = dense_loss(self.loss, self.miner, batch)
        left_out = torch.tensor(0.0, dtype=torch.float64)
        if batch.near_NR is not None:
            left_out = (batch.near_NR & (ids[:, None] != batch.ids_R)).sum(1).double().mean()
        return [loss, *torch.autograd.grad(loss, [descriptors, weight]), left_out]


def compare(case: Case, rtol: float, atol: float) -> str:
    """Trains a linear map by SGD over ranks beside one process; returns what differs beyond the tolerance."""
    rank, world = dist.get_rank(), dist.get_world_size()
    weight = first_weight(case.dtype).requires_grad_()
    queue = MemoryQueue(case.size, OUT, placement=case.placement).to(case.dtype)
    near = NearPlaces(case.points(), case.min_negative_m) if case.min_negative_m else None
    global_loss = GlobalLoss(case.config(), case.memory(), engine_reduces=case.engine_reduces, near=near)
    assert isinstance(global_loss.strategy, InTiles)
    global_loss.strategy.tiled.tile_bytes = case.tile_bytes
    stored: Stored = []
    for step, (x, ids) in enumerate(case.batches()):
        mine = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        local = F.normalize(x[mine] @ weight, dim=1)
        out = global_loss(local, ids[mine], queue, step=step)
        embedding_grad, gradient = torch.autograd.grad(out.loss, [local, weight])
        dist.all_reduce(gradient)
        if case.engine_reduces == "mean":
            gradient, embedding_grad = gradient / world, embedding_grad / world

        found = case.of_one_process(x, ids, weight, stored, step) if rank == 0 else []
        expected, embeddings, parameters, left_out = from_rank_0(found, [(), (len(x), OUT), (IN, OUT), ()])
        if near and not torch.equal(out.stats["near_negatives"], left_out):
            return f"{case}\nstep {step}: {out.stats['near_negatives']} pairs an anchor left out, not {left_out}"
        for what, value, right in (
            ("loss", out.loss, expected),
            ("embedding gradient", embedding_grad, embeddings[mine]),
            ("parameter gradient", gradient, parameters),
        ):
            if not torch.allclose(value.double(), right, rtol=rtol, atol=atol):
                return f"{case}\nstep {step}, {what}: off by {(value.double() - right).abs().max():.3g}"
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
        stored += [(d, int(i), step) for d, i in zip(out.descriptors_ND, ids, strict=True)]
        stored = stored[-case.size :] if case.size else []
        with torch.no_grad():
            weight -= 0.05 * gradient
    return ""


def assert_same(case: Case, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    """Tolerance in float64: sums of a few hundred terms of order 1 in another order (2e-16 each), times beta 50."""
    wrong = compare(case, rtol, atol)
    assert not wrong, wrong


def check_every_combination_equals_one_process() -> None:
    for loss, miner, placement, in_batch in itertools.product(
        LOSSES, MINERS, ("replicated", "sharded"), ("live", "detached")
    ):
        assert_same(Case(loss, miner, placement, in_batch))


def check_near_places_are_no_negatives() -> None:
    """Every loss and miner in both placements; pairs left out are counted."""
    choices = itertools.product(LOSSES, MINERS, ("replicated", "sharded"))
    for number, (loss, miner, placement) in enumerate(choices):
        in_batch = ("live", "detached")[number // 2 % 2]
        assert_same(Case(loss, miner, placement, in_batch, min_negative_m=60, steps=3))
    assert_same(Case(min_negative_m=1e5, places=4, size=0, steps=3))  # nothing but far squares is left
    assert_same(Case(min_negative_m=60, dtype=torch.float32, steps=5), rtol=1e-5, atol=1e-5)


def check_no_queue_and_a_batch_larger_than_the_queue() -> None:
    for loss, placement, size in itertools.product(LOSSES, ("replicated", "sharded"), (0, 3, 8, 16)):
        assert_same(Case(loss, placement=placement, size=size, steps=4))


def check_an_engine_that_sums() -> None:
    for loss, placement in itertools.product(LOSSES, ("replicated", "sharded")):
        assert_same(Case(loss, placement=placement, engine_reduces="sum", steps=4))


def check_float32() -> None:
    """Within 1e-5: float32's 6e-8 times beta 50, over the sum of a batch."""
    for loss, placement in itertools.product(LOSSES, ("replicated", "sharded")):
        assert_same(Case(loss, placement=placement, dtype=torch.float32, steps=5), rtol=1e-5, atol=1e-5)


def check_any_sizes_labels_and_seeds() -> None:
    """The same examples on every rank, whose verdicts are joined, so that all shrink together."""

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.builds(
            Case,
            loss=st.sampled_from(LOSSES),
            miner=st.sampled_from(MINERS),
            placement=st.sampled_from(["replicated", "sharded"]),
            in_batch=st.sampled_from(["live", "detached"]),
            size=st.integers(0, 40),
            per_rank=st.integers(1, 5),
            steps=st.integers(1, 7),
            decay_lambda=st.sampled_from([0.0, 0.1, 2.0]),
            tile_bytes=st.sampled_from([1, 2000, 1 << 20]),
            places=st.integers(1, 12),
            seed=st.integers(0, 1 << 16),
            min_negative_m=st.sampled_from([0, 0, 20, 90]),
        )
    )
    def run(case: Case) -> None:
        wrong = compare(case, 1e-9, 1e-10)
        verdicts = torch.tensor(len(wrong))
        dist.all_reduce(verdicts, dist.ReduceOp.MAX)
        assert not verdicts, wrong or "wrong on another rank"

    run()


def check_queues_are_bitwise_equal_after_500_steps() -> None:
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    sizes = torch.Generator().manual_seed(7)
    whole, sharded = MemoryQueue(101, 5), MemoryQueue(101, 5, placement="sharded")
    global_loss = GlobalLoss(LossConfig(), MemoryConfig(size=101))
    for step in range(500):
        count = int(torch.randint(1, 6, (), generator=sizes))
        local = F.normalize(torch.randn(count, 5, generator=generator), dim=1)
        out = global_loss(local, torch.randint(0, 50, (count,), generator=generator), whole, step=step)
        for queue in (whole, sharded):
            queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
    for tensor in whole.state_dict().values():
        copies = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(copies, tensor)
        assert all(torch.equal(copy, tensor) for copy in copies)
    part = sharded.entries()
    held = slice(dist.get_rank(), 101, world)
    for mine, all_of_it in zip(part, whole.entries(), strict=True):
        assert torch.equal(mine, all_of_it[held])


def check_unequal_batches_name_the_ranks() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    global_loss = GlobalLoss(LossConfig(), MemoryConfig(size=8))
    count = 3 if rank == 0 else 2
    local, ids = F.normalize(torch.ones(count, 4), dim=1), torch.zeros(count, dtype=torch.int64)
    if world > 1:
        with pytest.raises(ValueError, match="rank 0: 3 x 4, rank 1: 2 x 4"):
            global_loss(local, ids, MemoryQueue(8, 4), step=0)
    with pytest.raises(ValueError, match="empty on every rank"):
        global_loss(local[:0], ids[:0], MemoryQueue(8, 4), step=0)


def check_a_library_loss_equals_one_process() -> None:
    """CircleLoss and the library's own miner through the registry, gradient over ranks, self pairs removed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for in_batch, size in (("detached", 24), ("live", 0)):
        config = LossConfig(name="CircleLoss", miner="PairMarginMiner", args={"m": 0.3, "gamma": 20})
        global_loss = GlobalLoss(config, MemoryConfig(size=size, in_batch=in_batch))
        assert "no age weight" in global_loss.note
        queue = MemoryQueue(size, OUT).double()
        circle, miner = losses.CircleLoss(m=0.3, gamma=20), miners.PairMarginMiner()
        library = losses.CrossBatchMemory(circle, OUT, memory_size=size + 8, miner=miner).double()
        weight = first_weight().requires_grad_()
        for step, (x, ids) in enumerate(Case(steps=6).batches()):
            mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
            out = global_loss(F.normalize(x[mine] @ weight, dim=1), ids[mine], queue, step=step)
            (gradient,) = torch.autograd.grad(out.loss, weight)
            dist.all_reduce(gradient)
            whole = F.normalize(x @ weight, dim=1)
            expected = library(whole, ids) if size else circle(whole, ids, miner(whole, ids))
            (right,) = torch.autograd.grad(expected, weight)
            assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
            torch.testing.assert_close(gradient / world, right, rtol=1e-10, atol=1e-11)
            queue.enqueue(out.descriptors_ND, out.place_ids_N, step)


test_on_ranks = on_ranks(__file__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("in_batch", ["live", "detached"])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("name", LOSSES)
def test_without_decay_it_is_the_library(
    single_process: None, name: str, miner: str, in_batch: str, dtype: torch.dtype
) -> None:
    """live without a queue is the plain loss; detached with a queue is CrossBatchMemory."""
    # 16 images: of a batch in which no more than one pair is kept the library makes the loss 0
    case = Case(
        name, miner, in_batch=in_batch, decay_lambda=0, size=43 * (in_batch == "detached"), per_rank=16, dtype=dtype
    )
    plain = getattr(losses, name)()
    mine = getattr(miners, miner)() if miner != "none" else None
    library = losses.CrossBatchMemory(plain, OUT, memory_size=case.size + 16, miner=mine).to(dtype)
    queue = MemoryQueue(case.size, OUT).to(dtype)
    global_loss = GlobalLoss(case.config(), case.memory())
    atol = 1e-12 if dtype == torch.float64 else 1e-6
    for step, (x, ids) in enumerate(case.batches()):
        x.requires_grad_()
        descriptors = F.normalize(x[:, :OUT], dim=1)
        out = global_loss(descriptors, ids, queue, step=step)
        expected = library(descriptors, ids) if case.size else plain(descriptors, ids, mine and mine(descriptors, ids))
        assert abs(out.loss.item() - expected.item()) <= atol * max(1, abs(expected.item()))
        (gradient,) = torch.autograd.grad(out.loss, x, retain_graph=True)
        (right,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(gradient, right, rtol=atol, atol=atol)
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step)
