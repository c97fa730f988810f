"""What a training would take, from its recipe's numbers alone: memory, steps, bytes sent, time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from configs.node import GPUS
from configs.schema import Recipe
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from trainer.devices import memory_bytes
from trainer.feeding import Feeding, feeding_lines, find_feeding, stream_line
from trainer.first_checks import images_per_rank
from trainer.flops import model_flops, peak_tflops, step_flops
from trainer.hard_cost import hard_lines, num_candidates
from trainer.memory_parts import MemoryPlan
from trainer.memory_plan import GB, plan_memory
from trainer.parameter_sizes import Sizes, parameter_sizes
from trainer.places_plan import place_lines
from trainer.sent_bytes import bytes_sent

SUSTAINED = 0.2  # share of a GPU's peak where --tflops is not given; an H100 reached 0.12 to 0.27 (results/gpu.txt)
MEASURE_S = 0.5


class CannotFitError(ValueError):
    """A recipe that needs more memory than a rank has; the text says what would fit."""


@dataclass(frozen=True)
class Assumed:
    """What is known of the ranks beforehand; what is None is found out on this machine."""

    ranks: int | None = None  # WORLD_SIZE, else 1
    device_gb: float | None = None  # memory of a rank's GPU
    tflops: float | None = None  # sustained by a rank


@dataclass(frozen=True)
class Machine:
    """What a rank runs on."""

    on_cpu: bool
    device_bytes: float
    host_bytes: float | None  # of a rank; None where it is not known
    tflops: float | None
    tflops_from: str


def find_machine(assumed: Assumed, recipe: Recipe, ranks: int) -> Machine:
    """The device of a rank: this process's, or one as it is assumed."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    host = memory_bytes(torch.device("cpu"))
    if torch.cuda.is_available() or assumed.device_gb:
        known, peak, on_this = None, None, torch.cuda.is_available()
        if on_this:
            known = torch.cuda.mem_get_info()[1]
            peak = peak_tflops(torch.cuda.get_device_name(), recipe.engine.precision, tf32=recipe.engine.tf32)
            local_ranks = local_ranks or min(ranks, torch.cuda.device_count())
        peak = recipe.engine.peak_tflops or peak
        device = assumed.device_gb * GB if assumed.device_gb else float(known or 0)
        tflops = assumed.tflops or (SUSTAINED * peak if peak else None)
        source = "--tflops" if assumed.tflops else f"{SUSTAINED:.0%} of a peak of {peak:g} TFLOP/s" if peak else ""
        return Machine(False, device, host / local_ranks if on_this else None, tflops, source)
    tflops = assumed.tflops or measured_tflops()
    source = "--tflops" if assumed.tflops else f"a matrix product measured for {MEASURE_S:g} s on this machine"
    return Machine(True, host / (local_ranks or ranks), None, tflops, source)


def measured_tflops() -> float:
    """TFLOP/s of a square fp32 matrix product with as many threads as torch has here."""
    side, products = 768, 0
    a = torch.randn(side, side)
    a @ a
    began = time.perf_counter()
    while time.perf_counter() - began < MEASURE_S:
        a @ a
        products += 1
    return products * 2 * side**3 / (time.perf_counter() - began) / 1e12


def count_steps(
    recipe: Recipe, places: PlaceMixture | None
) -> tuple[int | None, int | None, float, str, EpochPlans | None]:
    """Steps of an epoch and in all, bytes of the shard sets, how they are known, and the plans if shards are here."""
    where = ", ".join(recipe.data.locations.values())
    if places is None:
        total = recipe.trainer.max_steps or None
        return None, total, math.inf, f"no shard index at {where}: the steps of an epoch are not known", None
    plans = EpochPlans(places, recipe.data, seed=recipe.seed)
    per_epoch = plans.num_steps
    num_bytes = float(sum(int(index.size.sum()) for index in places.sets))
    total = recipe.trainer.epochs * per_epoch
    if recipe.trainer.max_steps:
        total = min(total, recipe.trainer.max_steps)
    return per_epoch, total, num_bytes, f"from the index of {where}", plans


def _places(recipe: Recipe) -> PlaceMixture | None:
    try:
        return read_mixture(recipe.data)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a training."""

    recipe: Recipe
    ranks: int
    machine: Machine
    sizes: Sizes
    memory: MemoryPlan
    steps_per_epoch: int | None
    total_steps: int | None
    steps_from: str
    about_places: tuple[str, ...]
    sent: dict[str, float]
    flops: float  # of a rank in a step, with what is computed again
    seconds: float | None  # a step, computing alone
    shard_bytes: float
    feeding: Feeding
    memory_of: Callable[[Recipe], MemoryPlan]  # of the same ranks, the engine's settings being others

    @property
    def ranks_of_node(self) -> int:
        """Ranks of a node: this launch's, else as many as there are up to eight."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or min(self.ranks, GPUS)

    def figures(self) -> dict[str, float]:
        """Flat, for --json: bytes, steps, seconds."""
        out = {
            "ranks": float(self.ranks),
            "parameters_trained": float(self.sizes.trained),
            "parameters_frozen": float(self.sizes.frozen),
            "device_bytes": self.memory.device_peak,
            "host_bytes": self.memory.host_peak,
            "device_limit_bytes": self.machine.device_bytes,
            "step_flops": self.flops,
            "sent_bytes": sum(self.sent.values()),
        }
        for part in self.memory.parts:
            key = part.name.replace(" ", "_").replace(",", "")
            out |= {f"memory/{key}/device": part.device, f"memory/{key}/host": part.host}
        known = {
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "step_seconds": self.seconds,
            "tflops": self.machine.tflops,
        }
        out |= self.feeding.figures(self.ranks_of_node)
        return out | {name: float(value) for name, value in known.items() if value is not None}


def plan(recipe: Recipe, assumed: Assumed, sizes: Sizes | None = None) -> TrainingPlan:
    """Everything that `rerankvpr plan` prints; neither weights nor a process group are made.

    Raises ValueError for a batch that the ranks cannot share, and what `read_mixture` raises for a damaged index.
    """
    ranks = assumed.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    images = images_per_rank(recipe, ranks)
    machine = find_machine(assumed, recipe, ranks)
    sizes = sizes or parameter_sizes(recipe)
    places = _places(recipe)
    per_epoch, total, shard_bytes, source, plans = count_steps(recipe, places)
    every = recipe.trainer.checkpoint_every_steps or per_epoch
    saves_between_steps = recipe.trainer.checkpoint_every_s != 0 or every is None or total is None or every < total
    candidates = num_candidates(recipe, per_epoch)

    def memory_of(other: Recipe) -> MemoryPlan:
        return plan_memory(
            other,
            ranks=ranks,
            on_cpu=machine.on_cpu,
            sizes=sizes,
            saves_between_steps=saves_between_steps,
            shard_bytes=shard_bytes,
            hard_candidates=candidates,
        )

    flops = images * step_flops(recipe)
    seconds = flops / (machine.tflops * 1e12) if machine.tflops else None
    return TrainingPlan(
        recipe=recipe,
        ranks=ranks,
        machine=machine,
        sizes=sizes,
        memory=memory_of(recipe),
        steps_per_epoch=per_epoch,
        total_steps=total,
        steps_from=source,
        about_places=(
            *place_lines(recipe, plans),
            *hard_lines(recipe, ranks, candidates, per_epoch, seconds, machine.tflops),
        ),
        sent=bytes_sent(recipe, sizes, ranks),
        flops=flops,
        seconds=seconds,
        shard_bytes=shard_bytes,
        feeding=find_feeding(recipe, images / seconds if seconds else None, places),
        memory_of=memory_of,
    )


def shortfall(planned: TrainingPlan, memory: MemoryPlan | None = None) -> str:
    """What of a rank's memory a plan exceeds; empty where it fits."""
    memory, machine = memory or planned.memory, planned.machine
    if memory.device_peak > machine.device_bytes:
        where = "of this machine's memory" if machine.on_cpu else "on its GPU"
        return f"{memory.device_peak / GB:.1f} GB {where}, and has {machine.device_bytes / GB:.1f}"
    if machine.host_bytes is not None and memory.host_peak > machine.host_bytes:
        return f"{memory.host_peak / GB:.1f} GB of the host's memory, and has {machine.host_bytes / GB:.1f}"
    return ""


def changes(recipe: Recipe, ranks: int) -> Iterator[dict[str, Any]]:
    """Settings of the engine that need less memory, each cheaper in time than those after it."""
    images = recipe.data.places_per_batch * recipe.data.images_per_place // ranks
    stages = [stage for stage in (0, 1, 2, 3) if stage >= recipe.engine.zero_stage]
    more = [chunks for chunks in (1, 2, 4, 8, 16) if recipe.engine.encode_chunks * chunks <= images]
    for offload in ("none", "optimizer", "all"):
        for chunks in more:
            for checkpointing in (recipe.engine.activation_checkpointing, True):
                for stage in stages:
                    yield {
                        "zero_stage": stage,
                        "offload": offload if offload != "none" else recipe.engine.offload,
                        "activation_checkpointing": checkpointing,
                        "encode_chunks": recipe.engine.encode_chunks * chunks,
                    }


def with_engine(recipe: Recipe, changed: dict[str, Any]) -> Recipe | None:
    """The recipe with other settings of the engine; None where they do not go together."""
    try:
        engine = type(recipe.engine).model_validate({**recipe.engine.model_dump(), **changed})
    except ValueError:
        return None
    return recipe.model_copy(update={"engine": engine})


def advice(planned: TrainingPlan) -> str:
    """The first change of the engine's settings with which the recipe fits, as flags."""
    for changed in changes(planned.recipe, planned.ranks):
        other = with_engine(planned.recipe, changed)
        if other is None:
            continue
        memory = planned.memory_of(other)
        if not shortfall(planned, memory):
            before = planned.recipe.engine.model_dump()
            flags = " ".join(_flag(f"engine.{key}", value) for key, value in changed.items() if before[key] != value)
            return f"{flags} needs {memory.device_peak / GB:.1f} GB"
    return "no zero_stage, offload, activation_checkpointing or encode_chunks is enough: use more ranks"


def _flag(key: str, value: Any) -> str:
    """A key and its value as a person types them; a switch is only ever turned on here."""
    flag = f"--{key.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def alternatives(planned: TrainingPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """The recipe at other stages, offloads and with or without activation checkpointing."""
    for stage in (0, 1, 2, 3):
        for offload in ("none", "optimizer", "all"):
            for checkpointing in (False, True):
                changed = {"zero_stage": stage, "offload": offload, "activation_checkpointing": checkpointing}
                other = with_engine(planned.recipe, {**changed, "compile": False})
                if other:
                    name = f"ZeRO {stage}, offload {offload}" + (", activation checkpointing" if checkpointing else "")
                    yield name, planned.memory_of(other)


def print_plan(planned: TrainingPlan, console: Console) -> None:
    """The tables."""
    recipe, memory, machine = planned.recipe, planned.memory, planned.machine
    where = "CPU" if machine.on_cpu else "GPU"
    console.print(
        f"{recipe.name}: {recipe.model.backbone}, {planned.sizes.trained / 1e6:.1f} M parameters trained, "
        f"{planned.sizes.frozen / 1e6:.1f} M frozen; {planned.ranks} rank(s) on {where}, "
        f"ZeRO {recipe.engine.zero_stage}, offload {recipe.engine.offload}, {recipe.engine.precision}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="memory of a rank, GB", title_justify="left")
    for column in ("part", "held", "process" if machine.on_cpu else "device", "host"):
        table.add_column(column, justify="left" if column in ("part", "held") else "right")
    for part in memory.parts:
        device = part.device + (part.host if machine.on_cpu else 0.0)
        host = "" if machine.on_cpu else f"{part.host / GB:.3f}"
        table.add_row(part.name, ", ".join(part.phases), f"{device / GB:.3f}", host)
    table.add_section()
    host = "" if machine.on_cpu else f"{memory.host_peak / GB:.2f}"
    table.add_row("peak", "", f"{memory.device_peak / GB:.2f}", host, style="bold")
    console.print(table)
    others = Table(title="the same at other settings, GB", title_justify="left")
    for column in ("setting", "process" if machine.on_cpu else "device", "host"):
        others.add_column(column, justify="left" if column == "setting" else "right")
    for name, other in alternatives(planned):
        others.add_row(
            name,
            f"{other.device_peak / GB:.2f}",
            "" if machine.on_cpu else f"{other.host_peak / GB:.2f}",
            style="" if not shortfall(planned, other) else "dim",
        )
    console.print(others)
    for line in summary_lines(planned):
        console.print(line, highlight=False, soft_wrap=True)


def summary_lines(planned: TrainingPlan) -> Iterator[str]:
    """Steps, bytes sent and time, a line each."""
    per_epoch = "?" if planned.steps_per_epoch is None else str(planned.steps_per_epoch)
    total = "?" if planned.total_steps is None else str(planned.total_steps)
    yield f"steps: {per_epoch} per epoch, {total} in all ({planned.steps_from})"
    yield from planned.about_places
    sent = ", ".join(f"{name} {num_bytes / 1e6:.1f}" for name, num_bytes in planned.sent.items())
    if planned.recipe.data.access == "stream":
        yield stream_line(planned.recipe, planned.ranks, planned.shard_bytes)
    yield f"each rank sends {sum(planned.sent.values()) / 1e6:.1f} MB per step" + (f": {sent}" if sent else "")
    yield _time_line(planned)
    here = planned.machine.host_bytes is not None or planned.machine.on_cpu
    yield from feeding_lines(planned.recipe, planned.feeding, planned.ranks_of_node, is_this_machine=here)


def _time_line(planned: TrainingPlan) -> str:
    if planned.seconds is None:
        return f"a rank computes {planned.flops / 1e12:.2f} TFLOP a step; give --tflops for an estimate of time"
    hours = "" if planned.total_steps is None else f", {planned.total_steps * planned.seconds / 3600:.2f} h in all"
    assert planned.machine.tflops is not None
    useful = (
        planned.recipe.data.places_per_batch
        * planned.recipe.data.images_per_place
        // planned.ranks
        * model_flops(planned.recipe)
    )
    again = planned.flops / useful - 1
    return (
        f"time: {planned.seconds:.3f} s per step{hours}, if a rank sustains {planned.machine.tflops:.3g} TFLOP/s "
        f"({planned.machine.tflops_from}) and waits neither for data nor for other ranks; evaluation not counted"
        + (f"; {again:.0%} of it is computed again to save memory" if again > 0.005 else "")
    )


def check_fit(planned: TrainingPlan) -> None:
    """Raises CannotFitError, with settings that would fit, if a rank has too little memory."""
    if short := shortfall(planned):
        raise CannotFitError(f"a rank needs {short}; {advice(planned)}")
