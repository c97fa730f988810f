"""A loss for each data set over 1, 2 and 4 ranks equals dense losses of one process; their queues, saved and loaded."""

import itertools
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.registry import LOSSES, MINERS
from configs.schema import MemoryConfig
from memory.global_loss import GlobalLoss
from memory.gradient_cache import GradientCache
from memory.near_places import NearPlaces
from memory.place_sets import PlaceSets
from memory.queue import MemoryQueue, Placement
from memory.set_queues import SetQueues
from memory.strategies import InTiles
from tests.dense_loss import dense_loss
from tests.loss_cases import IN, OUT, LossCase, Stored, draw_images, first_weight, from_rank_0
from tests.ranks import on_ranks

FIRST_PLACE = [0, 5, 9, 15]
BLOCK = [2, 1, 1]  # images of each set in a block of 4; four blocks are a batch of 16
SIZES = [18, 7, 9]  # of the queues: filling, wrapping, full
DECAY_LAMBDA = 0.3


def queues_of(sets: PlaceSets, placement: Placement = "replicated") -> SetQueues:
    """Empty queues of SIZES."""
    return SetQueues([MemoryQueue(size, OUT, placement=placement) for size in SIZES], sets)


@dataclass(frozen=True)
class Case(LossCase):
    """A short training whose every step is compared."""

    queue_over: str = "set"
    host_knows: bool = True
    chunks: int = 1
    steps: int = 4
    weights: tuple[float, ...] = (1.0, 0.3, 2.5)

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Seeded inputs [16, IN] and places, each block with its share of each set."""
        generator = torch.Generator().manual_seed(5)
        centres = torch.randn(FIRST_PLACE[-1], IN, generator=generator, dtype=torch.float64)
        out = []
        for _ in range(self.steps):
            ids = [
                torch.randint(FIRST_PLACE[number], FIRST_PLACE[number + 1], (count,), generator=generator)
                for _ in range(4)
                for number, count in enumerate(BLOCK)
            ]
            places = torch.cat(ids)
            out.append((draw_images(centres, places, generator), places))
        return out

    def points(self) -> torch.Tensor:
        """Places in a square of 150 m, near to those of other sets too, in steps of 1/8 m."""
        generator = torch.Generator().manual_seed(6)
        return (150 * 8 * torch.rand(FIRST_PLACE[-1], 3, generator=generator, dtype=torch.float64)).round() / 8

    def build(self) -> tuple[GlobalLoss, MemoryQueue | SetQueues]:
        memory = MemoryConfig.model_validate(
            {
                **{"size": sum(SIZES), "placement": self.placement, "in_batch": self.in_batch},
                **{"decay_lambda": DECAY_LAMBDA, "min_negative_m": self.min_negative_m, "queue_over": self.queue_over},
            }
        )
        sets = PlaceSets(["a", "b", "c"], FIRST_PLACE, self.weights)
        near = NearPlaces(self.points(), self.min_negative_m) if self.min_negative_m else None
        made = GlobalLoss(self.config(), memory, near=near, sets=sets)
        assert isinstance(made.strategy, InTiles)
        made.strategy.tiled.tile_bytes = 1000
        if self.queue_over == "all":
            return made, MemoryQueue(sum(SIZES), OUT, placement=memory.placement).double()
        return made, queues_of(sets, memory.placement).double()

    def of_one_process(
        self, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, stored: Stored, step: int
    ) -> list[torch.Tensor]:
        """The gradient of the weight, and the loss of each set by itself."""
        weight = weight.detach().clone().requires_grad_()
        descriptors, parts = F.normalize(x @ weight, dim=1), []
        for number, size in enumerate(SIZES):
            rows = set_of(ids) == number
            of_set = [one for one in stored if int(set_of(torch.tensor(one[1]))) == number][-size:]
            held = of_set if self.queue_over == "set" else stored[-sum(SIZES) :]
            ages = [DECAY_LAMBDA * (step - entered) for _, _, entered in held]
            batch = self.batch(descriptors[rows], ids[rows], held, ages, self.points())
            parts.append(dense_loss(self.loss, self.miner, batch))
        total = torch.tensor(self.weights, dtype=torch.float64) @ torch.stack(parts)
        return [*torch.autograd.grad(total, weight), *parts]


def set_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(ids, torch.tensor(FIRST_PLACE[1:-1]), right=True)


def _encode(weight: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor]:
    return (F.normalize(images @ weight, dim=1),)


def compare(case: Case) -> None:
    """Trains a linear map by SGD over ranks beside one process; tolerances are those of tests/test_global_loss.py."""
    rank, world = dist.get_rank(), dist.get_world_size()
    weight = first_weight().requires_grad_()
    global_loss, queue = case.build()
    stored: Stored = []
    for step, (x, ids) in enumerate(case.batches()):
        mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
        encode = partial(_encode, weight)
        cache = GradientCache(encode, x[mine].tensor_split(case.chunks)) if case.chunks > 1 else None
        (local,) = cache.outputs if cache else encode(x[mine])
        known = ids if case.host_knows else None
        out = global_loss(local, ids[mine], queue, step=step, place_ids_N=known)
        if cache:
            weight.grad = None
            cache.backward(out.loss, lambda part: part.backward())
            assert weight.grad is not None
            gradient = weight.grad.clone()
        else:
            (gradient,) = torch.autograd.grad(out.loss, weight)
        dist.all_reduce(gradient)
        gradient /= world

        expected = case.of_one_process(x, ids, weight, stored, step) if rank == 0 else []
        right, *losses = from_rank_0(expected, [(IN, OUT), (), (), ()])
        parts = torch.stack(losses)
        found = torch.stack([out.stats[f"{name}/loss"] for name in "abc"])
        total = torch.tensor(case.weights, dtype=torch.float64) @ parts
        torch.testing.assert_close(found, parts, rtol=1e-10, atol=1e-11, msg=str(case))
        torch.testing.assert_close(out.loss.detach(), total, rtol=1e-10, atol=1e-11, msg=str(case))
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-11, msg=str(case))
        queue.enqueue(out.descriptors_ND, out.place_ids_N, step, host_ids_N=out.host_ids_N)
        stored += [(d, int(i), step) for d, i in zip(out.descriptors_ND, ids, strict=True)]
        with torch.no_grad():
            weight -= 0.05 * gradient


def check_sets_equal_dense_losses_of_one_process() -> None:
    """Every loss and miner with every placement and queue; half of them with near places, half detached."""
    choices = itertools.product(LOSSES, MINERS, ("replicated", "sharded"), ("set", "all"))
    for number, (loss, miner, placement, over) in enumerate(choices):
        in_batch, metres = ("live", "detached")[number // 4 % 2], (0, 60)[number // 8 % 2]
        case = Case(loss, miner, placement, in_batch, metres, over, host_knows=number % 3 > 0, steps=2)
        compare(case)


def check_the_queue_wraps_and_chunks_change_nothing() -> None:
    for placement, over in itertools.product(("replicated", "sharded"), ("set", "all")):
        compare(Case(placement=placement, queue_over=over, min_negative_m=60, steps=7))
        compare(Case(placement=placement, queue_over=over, min_negative_m=60, chunks=3))


def check_a_set_that_ranks_hold_unequally_is_refused() -> None:
    global_loss, queue = Case().build()
    world = dist.get_world_size()
    ids = torch.cat([torch.arange(4), torch.tensor([6] * 4), torch.tensor([10] * 4 * max(1, world - 2))])[: 4 * world]
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    rows = F.normalize(torch.randn(4, OUT), dim=1).double()
    with pytest.raises(ValueError, match="each rank must have equally many"):
        global_loss(rows, ids[mine], queue, step=0)


def check_queues_of_sets_load_at_another_layout() -> None:
    """Saved sharded, loaded replicated, and the other way round: every entry, in order, in its set's queue."""
    sets = PlaceSets(["a", "b", "c"], FIRST_PLACE, [1, 1, 1])
    world = dist.get_world_size()
    sharded, whole = queues_of(sets, "sharded"), queues_of(sets)
    generator = torch.Generator().manual_seed(1)
    for step, (_, ids) in enumerate(Case(steps=5).batches()):
        rows = torch.randn(16, OUT, generator=generator)
        for queue in (sharded, whole):
            queue.enqueue(rows, ids, step, host_ids_N=ids if step % 2 else None)
    assert len(whole) == len(sharded) == sum(SIZES)
    for number in range(3):
        assert (set_of(whole.of_set(number).place_ids_M) == number).all()
    states: list = [None] * world
    dist.all_gather_object(states, dict(sharded.state_dict()))
    again = queues_of(sets)
    again.load_shards(states)
    for key, value in whole.state_dict().items():
        assert key.endswith("shard") or torch.equal(value, again.state_dict()[key]), key
    parts = queues_of(sets, "sharded")
    parts.load_shards([whole.state_dict()])
    for key, value in sharded.state_dict().items():
        assert torch.equal(value, parts.state_dict()[key]), key
    with pytest.raises(ValueError, match="one of 1 sets, this one of 3"):
        again.load_shards([MemoryQueue(sum(SIZES), OUT).state_dict()])
    if world > 1:
        with pytest.raises(ValueError, match="shards, of which"):
            queues_of(sets).load_shards(states[:1])


test_on_ranks = on_ranks(__file__)


def test_figures_are_by_set_and_over_all(single_process: None) -> None:
    global_loss, queue = Case(min_negative_m=60).build()
    (x, ids), *_ = Case().batches()
    rows = F.normalize(x[:, :OUT], dim=1)
    queue.enqueue(rows, ids, 0)
    out = global_loss(rows, ids, queue, step=1)
    names = {name for name in out.stats if "/" not in name}
    assert names == {
        *("mined_positives", "mined_negatives", "trivial_anchors", "near_negatives"),
        *("queue_fill", "queue_effective_size", "decay_half_life"),
    }
    assert out.stats["queue_fill"] == len(queue) == sum(min(s, 4 * b) for s, b in zip(SIZES, BLOCK, strict=True))
    mean = sum(b / 4 * out.stats[f"{name}/near_negatives"] for name, b in zip("abc", BLOCK, strict=True))
    assert out.stats["near_negatives"] == pytest.approx(float(mean))
    assert out.stats["b/queue_fill"] == 4
