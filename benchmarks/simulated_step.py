"""The step of rank 0 of many, run on tensors that have shapes alone: what it sends, holds and computes, all counted.

The product's own step and DeepSpeed's own engine run, on the pretend device of the tests and under torch's fake process
group, in which a collective operation returns at once. No formula of `rerankvpr plan` is used.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeStore, ProcessGroup
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from configs.schema import Recipe
from memory.queue import MemoryQueue, _HostIds
from memory.set_queues import SetQueues
from model.network import meta_model
from tests.pretend_device import HERE, Elsewhere
from tests.pretend_step import Steps, pretend_training_device, steps_elsewhere

ROOT = Path(__file__).resolve().parent.parent
FIRST_IN_QUEUE = 10**6  # place ids of the queue: of no place in the batch
# Position of the tensor that all ranks have together, and of the group, among an operation's arguments.
OPERATIONS = {
    "allreduce_": ("all_reduce", 0, 1),
    "allreduce_coalesced_": ("all_reduce", 0, 1),
    "_allgather_base_": ("all_gather", 0, 2),
    "allgather_": ("all_gather", 0, 2),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "reduce_scatter_": ("reduce_scatter", 1, 2),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2),
    "broadcast_": ("broadcast", 0, 1),
    "reduce_": ("reduce", 0, 1),
}
WITHOUT_BYTES = {"barrier"}
ROUNDS = {"all_reduce": 2}  # a ring sends (W - 1) / W of the tensor once, an all-reduce twice


@dataclass(frozen=True)
class Sent:
    """A collective operation."""

    kind: str
    num_bytes: int  # of the tensor that all ranks have together
    ranks: int
    section: str  # of the step
    place: str  # the innermost file and function of this project, or of DeepSpeed

    @property
    def wire_bytes(self) -> float:
        """What each rank sends of it in a ring."""
        return ROUNDS.get(self.kind, 1) * (self.ranks - 1) / self.ranks * self.num_bytes

    @property
    def purpose(self) -> str:
        """What it is for, in the words of `rerankvpr plan`."""
        if self.place.startswith("memory/gather"):
            return "descriptors' gradients, scattered" if self.kind == "reduce_scatter" else "descriptors, gathered"
        if not self.place.startswith("deepspeed"):
            return "sharded queue, anchors' sums" if "tiles" in self.place else "figures and votes"
        if self.kind == "all_gather":
            return "weights, after the update" if self.section == "update" else "weights, gathered for use"
        return "gradients, reduced" if self.section == "backward" else "norm and overflow"


@dataclass
class Simulated:
    """Counts of one step of a rank."""

    sent: Counter[Sent] = field(default_factory=Counter)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)  # by section and dtype, of matrix products
    touched: Counter[str] = field(default_factory=Counter)  # bytes read and written by all else, by section
    held: dict[str, int] = field(default_factory=dict)  # bytes between steps, by part
    peaks: dict[str, int] = field(default_factory=dict)  # most bytes in each section
    kept: int = 0  # bytes that the forward pass leaves for the backward pass

    def wire_bytes(self) -> dict[str, float]:
        """What each rank sends in the step, by purpose."""
        by_purpose: dict[str, float] = defaultdict(float)
        for sent, count in self.sent.items():
            by_purpose[sent.purpose] += count * sent.wire_bytes
        return dict(by_purpose)


def collective(func: Any, args: tuple[Any, ...]) -> tuple[str, int, int]:
    """Kind, bytes of the whole tensor, and ranks of an operation of torch.distributed.

    Raises NotImplementedError for one that is not known here.
    """
    name = func.overloadpacket.__name__
    if name in WITHOUT_BYTES:
        return name, 0, 1
    if name not in OPERATIONS:
        raise NotImplementedError(f"{func}: how much it sends is not known")
    kind, tensors, group = OPERATIONS[name]
    num_bytes = sum(one.numel() * one.element_size() for one in tree_leaves(args[tensors]))
    return kind, num_bytes, ProcessGroup.unbox(args[group]).size()


def place() -> str:
    """The innermost file and function of this project or of DeepSpeed that runs, DeepSpeed's wrappers left out."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/deepspeed/" in file and "/deepspeed/comm/" not in file and "/deepspeed/utils/" not in file:
            return f"deepspeed/{file.partition('/deepspeed/')[2]}:{frame.f_code.co_name}"
        path = Path(file)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("memory", "trainer", "model"):
            return f"{path.relative_to(ROOT).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class Counts:
    """Counts what happens on a device, by section of the step."""

    def __init__(self) -> None:
        self.found, self.section, self.total = Simulated(), "build", 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def enter(self, section: str, _step: int = 0) -> None:
        """A section of the step begins."""
        if section == "loss":
            self.found.kept = self.total - sum(self.found.held.values())
        self.section = {"step": "backward"}.get(section, section)
        self._peak()

    def made(self, held: torch.Tensor) -> None:
        """Counts the memory of a tensor, unless another one has it already."""
        storage = held.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = storage.nbytes()

        def freed(_: object) -> None:
            if self._live.pop(key, None):
                self.total -= num_bytes

        self._live[key] = (weakref.ref(storage, freed), num_bytes)
        self.total += num_bytes
        self._peak()

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors no more that are shapes without memory on a real device too."""
        for one in tensors:
            assert isinstance(one, Elsewhere)
            _, num_bytes = self._live.pop(one.held.untyped_storage()._cdata)
            self.total -= num_bytes

    def _peak(self) -> None:
        self.found.peaks[self.section] = max(self.total, self.found.peaks.get(self.section, 0))

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Counts the operations of a matrix product, and the bytes of anything else that is no view."""
        packet = func.overloadpacket
        packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)  # in place: the same arithmetic
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
        if packet in flop_registry:
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            self.found.flops[self.section, dtype] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif not func.is_view:
            self.found.touched[self.section] += sum(one.numel() * one.element_size() for one in tensors)

    def collective(self, func: Any, args: tuple[Any, ...]) -> None:
        """Counts an operation of torch.distributed."""
        kind, num_bytes, ranks = collective(func, args)
        if num_bytes:
            self.found.sent[Sent(kind, num_bytes, ranks, self.section, place())] += 1

    def bytes_of(self, tensors: list[torch.Tensor]) -> int:
        """Bytes of the memory of these tensors, each once."""
        storages = {one.held.untyped_storage()._cdata for one in tensors if isinstance(one, Elsewhere)}
        return sum(self._live[key][1] for key in storages if key in self._live)


def simulate(recipe: Recipe, ranks: int, *, full: bool = True) -> Simulated:
    """Counts of the second step of rank 0 of `ranks`, the queue being `full`; in a process that has no process group.

    DeepSpeed keeps state in its modules: each simulation needs a process of its own.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - makes the backend known

    _stand_in_for_deepspeed()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model = meta_model(recipe.model)
    counts = Counts()
    with pretend_training_device(numerics=False, watcher=counts):
        steps = steps_elsewhere(recipe, model, counts.enter)
        for shapes in getattr(steps.state.engine.optimizer, "round_robin_bit16_meta", []):
            counts.leave_out(shapes)
        if full:
            _fill(steps.state.queue)
        _as_on_gpu(steps.state.engine.optimizer)
        _announce(steps.state.engine, counts.enter)
        for number in range(2):  # the first makes optimizer state and compares the ranks' batches
            if number:
                _forget(counts, steps)
            counts.enter("forward")
            steps.next()
            counts.enter("between")
    dist.destroy_process_group()
    return counts.found


def _stand_in_for_deepspeed() -> None:
    """Replaces what of ZeRO-3 compares numbers, and what cuts each weight into W parts to put them together again.

    The parts are 1,024 for each weight and rank; what is sent and held is the same without them.
    """
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = _broadcast
    partition_parameters.AllGatherCoalescedHandle.wait = _gathered
    stage3.reduce_scatter_coalesced = _reduced_and_scattered


def _gathered(handle: Any, handle_dependency: bool = True) -> None:  # noqa: ARG001
    """Ends a gather of weights: each is there whole, in memory of its own."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if handle.complete:
        return
    handle.allgather_handle.wait()
    for param in handle.params:
        whole = torch.empty(param.ds_numel, dtype=handle.partitions[0].dtype, device=HERE)
        param.data = whole.view(param.ds_shape).to(param.ds_tensor.dtype)
        param.ds_status = ZeroParamStatus.AVAILABLE
    handle.complete = True


def _reduced_and_scattered(tensors: list[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """This rank's part of each gradient: a view of one tensor of all, padded to equal parts."""
    import deepspeed
    from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn

    ranks, rank = deepspeed.comm.get_world_size(group), deepspeed.comm.get_rank(group)
    sizes = [math.ceil(one.numel() / ranks) for one in tensors]
    together = tensors[0].view(-1) if len(tensors) == 1 and tensors[0].numel() == ranks * sizes[0] else None
    if together is None:
        together = torch.empty(ranks * sum(sizes), dtype=tensors[0].dtype, device=HERE)
    own = together.narrow(0, rank * sum(sizes), sum(sizes))
    _torch_reduce_scatter_fn(together, own, group=group)
    numels = [max(0, min(size, one.numel() - rank * size)) for size, one in zip(sizes, tensors, strict=True)]
    starts = itertools.accumulate(sizes, initial=0)
    return [own.narrow(0, start, numel) for start, numel in zip(starts, numels, strict=False)]


def _broadcast(numbers: list[int]) -> None:
    """Sends what DeepSpeed sends to compare the ranks' numbers, without comparing: there are none here."""
    import deepspeed

    for sent in (len(numbers), numbers):
        deepspeed.comm.broadcast(torch.tensor(sent, dtype=torch.int64, device=HERE), src=0)


def _fill(queue: MemoryQueue | SetQueues) -> None:
    """Fills the queue with entries of other places."""
    assert isinstance(queue, MemoryQueue)
    known = _HostIds(FIRST_IN_QUEUE + torch.arange(queue.size) // 4)
    known.belongs_to(queue.place_ids_M)
    queue._known = known
    queue.num_enqueued.fill_(queue.size)


def _as_on_gpu(optimizer: Any) -> None:
    """Has torch's Adam update in one kernel, as `build_engine` has it on a GPU, and SGD many tensors at once."""
    inner = getattr(optimizer, "optimizer", optimizer)
    is_adam = isinstance(inner, torch.optim.Adam)
    vars(sys.modules[torch.optim.Adam.__module__])["_device_dtype_check_for_fused"] = lambda *_, **__: None
    for group in inner.param_groups:
        group |= {"fused": is_adam, "foreach": not is_adam}


def _announce(engine: Any, enter: Callable[[str], None]) -> None:
    """Has the engine say when backward ends and the update begins, which it makes after the last chunk alone."""
    step = engine.step

    def told(*args: Any, **kwargs: Any) -> Any:
        if not engine.is_gradient_accumulation_boundary():
            return step(*args, **kwargs)
        enter("update")
        out = step(*args, **kwargs)
        enter("backward")
        return out

    engine.step = told


def _forget(counts: Counts, steps: Steps) -> None:
    """Starts counting a step, all that is held between steps being there."""
    queue, model = steps.state.queue, steps.state.model
    weights = [part for one in model.parameters() for part in (one, getattr(one, "ds_tensor", one))]
    held = {"weights": counts.bytes_of(weights), "queue": counts.bytes_of(list(queue.buffers()))}
    counts.found = Simulated(held={**held, "all else": counts.total - sum(held.values())})
