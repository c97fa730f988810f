"""A step simulated without numbers: what it counts is what real ranks send, and what the plan's formulas say."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist

import trainer.engine
from benchmarks.links import Cluster, step_time
from benchmarks.simulate import Options, compare, recipe_of, simulate_all
from benchmarks.simulated_step import Sent, Simulated, simulate
from configs.schema import Recipe
from tests import forked, pretend_step
from tests.pretend_step import steps_on_cpu
from tests.ranks import GROUPS, run_check
from trainer.engine import LIVE
from trainer.parameter_sizes import parameter_sizes

RANKS = 4
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "ZeRO 1, sharded": {"engine": {"zero_stage": 1}, "memory": {"placement": "sharded"}},
    "ZeRO 2, chunks": {"engine": {"zero_stage": 2, "encode_chunks": 2}},
    "ZeRO 3, bf16, few weights whole": {
        **{"engine": {"zero_stage": 3, "precision": "bf16"}, "model": {"finetune": "all"}},
    },
}
FEW = 30_000  # elements that ZeRO-3 keeps whole on a rank; a block of `tiny14` has more
# Of each function of torch.distributed the position of the tensor, or list of tensors, that all ranks have together.
FUNCTIONS = {
    "all_reduce": ("all_reduce", 0),
    "all_gather": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
}


def small(name: str) -> Recipe:
    """The recipe of a case, its setting of trainer.engine with it."""
    trainer.engine.LIVE = FEW if "few" in name else LIVE
    return pretend_step.recipe_of(**{"data": {"places_per_batch": 8}, **CHANGES[name]})


class Wrapped:
    """torch.distributed's functions, told of each call's bytes, while inside a `with`; DeepSpeed's own copies too."""

    def __init__(self) -> None:
        self.num_bytes: Counter[str] = Counter()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Wrapped:
        for name in FUNCTIONS:
            self._wrap(dist, name, name)
        backend = deepspeed.comm.comm.cdb
        self._wrap(backend, "all_gather_function", "all_gather_into_tensor")
        self._wrap(backend, "reduce_scatter_function", "reduce_scatter_tensor")
        return self

    def __exit__(self, *_: object) -> None:
        for where, name, function in reversed(self._before):
            setattr(where, name, function)

    def _wrap(self, where: Any, name: str, as_in_torch: str) -> None:
        function: Callable[..., Any] = getattr(where, name)
        kind, position = FUNCTIONS[as_in_torch]
        names = {0: ("tensor", "tensor_list", "output_tensor"), 1: ("input", "input_list", "input_tensor")}

        def told(*args: Any, **kwargs: Any) -> Any:
            given = args[position] if len(args) > position else next(kwargs[n] for n in names[position] if n in kwargs)
            tensors = given if isinstance(given, list) else [given]
            self.num_bytes[kind] += sum(one.numel() * one.element_size() for one in tensors)
            return function(*args, **kwargs)

        self._before.append((where, name, function))
        setattr(where, name, told)


def count_on_ranks() -> None:
    """Rank 0 writes what the second step of each recipe sends, by kind, to the group's folder."""
    for name in CHANGES:
        steps = steps_on_cpu(small(name))
        steps.next()
        with Wrapped() as wrapped:
            steps.next()
        if dist.get_rank() == 0:
            (Path(tempfile.gettempdir()) / f"{name}.json").write_text(json.dumps(wrapped.num_bytes))


def simulated_bytes(name: str, file: str) -> None:
    """The same, simulated."""
    found: Counter[str] = Counter()
    for sent, count in simulate(small(name), RANKS, full=False).sent.items():
        found[sent.kind] += count * sent.num_bytes
    Path(file).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.usefixtures("groups_of_ranks")
def test_real_ranks_send_to_the_byte_what_the_simulation_counts(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{number}.json" for number, name in enumerate(CHANGES)}
    running = [forked.fork(simulated_bytes, name, str(file)) for name, file in files.items()]
    errors = run_check("tests.test_simulate", "count_on_ranks", RANKS)
    assert not errors, "\n".join(errors)
    for process in running:
        process.join()
    for name, file in files.items():
        simulated = json.loads(file.read_text())
        assert simulated == json.loads((GROUPS[RANKS].folder / f"{name}.json").read_text()), name
        assert sum(simulated.values()) > 1000


@pytest.mark.slow
def test_formulas_of_the_plan_are_within_5_percent_of_a_simulated_step() -> None:
    """Of ViT-S on 64 GPUs, with shapes as they are in a training; of memory each part, and the peak of each section."""
    options = Options(backbone="vits14", places=15)
    settings = [(64, 1, "replicated", 1), (64, 1, "sharded", 2), (64, 3, "sharded", 2)]
    recipes = {setting: recipe_of(options, setting) for setting in settings}
    sizes = parameter_sizes(recipes[settings[0]])
    for setting, counted in simulate_all(recipes).items():
        compared = compare(recipes[setting], 64, sizes, counted)
        assert all(abs(share) < 0.05 for share in compared.off.values()), (setting, compared.off)
        for part, (held, planned) in compared.memory.items():
            assert planned == pytest.approx(held, rel=0.05), (setting, part)


def test_time_on_links() -> None:
    cluster = Cluster(links_reach=1.0, base_s=0.0, nvlink_hop_s=0.0, net_hop_s=0.0, nvlink_tree_s=0.0, net_tree_s=0.0)
    gathered = Sent("all_gather", 450 * 10**6, 8, "loss", "memory/gather.py:all_gather")
    assert cluster.seconds(gathered) == pytest.approx(7 / 8 * 1e-3)
    assert cluster.seconds(Sent("all_gather", 400 * 10**6, 16, "", "")) == pytest.approx(15 / 16 * 1e-3)  # 8 cards
    assert cluster.seconds(Sent("all_reduce", 400 * 10**6, 16, "", "")) == pytest.approx(2 * 15 / 16 * 1e-3)
    assert cluster.seconds(Sent("all_reduce", 10**9, 1, "", "")) == 0
    slow = Cluster()
    assert slow.seconds(Sent("all_reduce", 4, 1024, "", "")) < slow.seconds(
        Sent("all_gather", 4, 1024, "", "")
    )  # a tree
    reduced = Sent("reduce_scatter", 10**9, 8, "backward", "deepspeed/runtime/zero/stage3.py:reduce")
    counted = Simulated(sent=Counter({reduced: 1}), flops=Counter({("forward", "bfloat16"): 10**12}))
    exposed, hidden = (step_time(counted, slow, zero_stage=stage) for stage in (1, 3))
    assert hidden.overlapped == pytest.approx(min(hidden.network, slow.seconds(reduced)))
    assert exposed.total == pytest.approx(hidden.total + hidden.overlapped)


def test_each_operation_has_its_purpose() -> None:
    at = {
        ("all_gather", "loss", "memory/gather.py:all_gather"): "descriptors, gathered",
        ("reduce_scatter", "backward", "memory/gather.py:backward"): "descriptors' gradients, scattered",
        ("all_reduce", "loss", "memory/tiles.py:forward"): "sharded queue, anchors' sums",
        ("all_reduce", "between", "trainer/step.py:_read"): "figures and votes",
        ("all_gather", "update", "deepspeed/runtime/zero/stage_1_and_2.py:step"): "weights, after the update",
        ("all_gather", "forward", "deepspeed/runtime/zero/x.py:fetch"): "weights, gathered for use",
        ("all_reduce", "backward", "deepspeed/runtime/zero/stage_1_and_2.py:r"): "gradients, reduced",
        ("all_reduce", "update", "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow"): "norm and overflow",
    }
    for (kind, section, place), purpose in at.items():
        assert Sent(kind, 1, 4, section, place).purpose == purpose
