"""A step on up to 1,024 GPUs, run on this machine without numbers: bytes sent, memory and, on paper, weak scaling.

Rank 0 of W runs the product's own step with DeepSpeed's engine on tensors of shapes alone, and what it sends, holds and
computes is counted (benchmarks/simulated_step.py). The counts stand beside the formulas of `rerankvpr plan`. From them
and published speeds (benchmarks/links.py) follows how long a step takes on H100s.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.links import Cluster, StepTime, shortened, step_time
from benchmarks.memory_scaling import bytes_sent as bytes_of_loss
from benchmarks.report import print_table, write_json
from benchmarks.simulated_step import Simulated, simulate
from configs.schema import Recipe
from trainer.memory_plan import plan_memory
from trainer.parameter_sizes import Sizes, parameter_sizes
from trainer.sent_bytes import bytes_sent

MIB = 2**20
# The plan's phases in each section of a step; the end of forward holds what the loss then finds.
SECTIONS = {
    **{"forward": ("augment", "forward", "loss"), "loss": ("loss",)},
    **{"backward": ("backward", "bucket", "reduce"), "update": ("update",)},
}
HELD = {
    "weights": ("weights", "weights, partitioned", "weights, small ones whole"),
    "queue": ("queue",),
    "all else": ("optimizer", "reduce bucket", "gradients", "augmentation's grids"),
}
LOSS = ("descriptors, gathered", "descriptors' gradients, scattered", "sharded queue, anchors' sums")

Setting = tuple[int, int, str, int]  # ranks, ZeRO stage, placement, chunks


@dataclass(frozen=True)
class Options:
    """Counts a step at each world size and setting, and prints it beside the plan's formulas."""

    gpus: list[int] = field(default_factory=lambda: [8, 64, 256, 1024])
    """World sizes."""
    zero_stages: list[Literal[0, 1, 2, 3]] = field(default_factory=lambda: [1, 3])
    """ZeRO stages."""
    placements: list[Literal["replicated", "sharded"]] = field(default_factory=lambda: ["replicated", "sharded"])
    """Placements of the queue."""
    chunks: list[int] = field(default_factory=lambda: [1, 4])
    """Values of engine.encode_chunks; 1 is without gradient cache."""
    backbone: str = "vitb14"
    """Backbone, all blocks of which are trained."""
    aggregator: str = "cls"
    """Aggregator: of its descriptors' length depends what the loss sends."""
    places: int = 30
    """Places per GPU, of 4 images each."""
    size: int = 65_536
    """M, entries of the queue."""
    image_size: int = 224
    """Side in pixels."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """engine.precision."""
    overlap: bool = False
    """engine.overlap, at ZeRO 1 and 2."""
    collectives: bool = False
    """Prints each kind of collective operation too: how often, how much, and where."""
    json: Path | None = None
    """File for the figures."""


def recipe_of(options: Options, setting: Setting) -> Recipe:
    """The recipe that is run and planned."""
    ranks, stage, placement, chunks = setting
    return Recipe.model_validate(
        {
            "name": "simulated",
            "output": "unused",
            "data": {
                **{"shards": "none", "places_per_batch": options.places * ranks, "images_per_place": 4},
                **{"image_size": options.image_size},
            },
            "model": {
                **{"backbone": options.backbone, "weights": "random", "finetune": "all"},
                "aggregator": options.aggregator,
            },
            "memory": {"size": options.size, "placement": placement, "start_epoch": 0},
            "engine": {
                **{"zero_stage": stage, "precision": options.precision, "encode_chunks": chunks},
                "overlap": options.overlap and stage in (1, 2),
            },
            "tracking": {"enabled": False},
        }
    )


def simulate_all(recipes: dict[Setting, Recipe]) -> dict[Setting, Simulated]:
    """Counts of a step of rank 0 of each, every one in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.simulated_step"])
    counted = {}
    for setting, recipe in recipes.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            counted[setting] = pool.submit(simulate, recipe, setting[0]).result()
    return counted


@dataclass(frozen=True)
class Compared:
    """Counts beside formulas, in bytes of a rank: (counted, planned) by name."""

    sent: dict[str, tuple[float, float]]
    memory: dict[str, tuple[float, float]]

    @property
    def off(self) -> dict[str, float]:
        """How far the formula is off, as a share of what was counted; of sums, and of the peak of the step."""
        return {
            "sent": _off(*_sum(self.sent.values())),
            "sent for the loss": _off(*_sum(self.sent[name] for name in LOSS if name in self.sent)),
            "memory": _off(*self.memory["peak"]),
        }


def compare(recipe: Recipe, ranks: int, sizes: Sizes, counted: Simulated) -> Compared:
    """Counts beside what `rerankvpr plan` says of the same recipe on GPUs."""
    planned, wire = bytes_sent(recipe, sizes, ranks), counted.wire_bytes()
    sent = {name: (wire.get(name, 0.0), planned.get(name, 0.0)) for name in {**planned, **wire}}
    parts = [part for part in plan_memory(recipe, ranks=ranks, on_cpu=False, sizes=sizes).parts if part.device]
    apart = ("process", "batches copied ahead")  # what is not the step's
    parts = [part for part in parts if part.name not in apart and "evaluate" not in part.phases]
    memory = {
        name: (
            float(counted.held[name]),
            sum(part.device for part in parts if part.name in names and "always" in part.phases),
        )
        for name, names in HELD.items()
    }
    kept = [part for part in parts if part.name.startswith("activations") and "loss" in part.phases]
    of_images = [part for part in parts if part.name == "images of the step"]
    memory["activations and images"] = float(counted.kept), sum(part.device for part in kept + of_images)
    for section, phases in SECTIONS.items():
        there = [part for part in parts if section != "forward" or part.name != "loss"]
        at = [sum(part.device for part in there if {phase, "always"} & set(part.phases)) for phase in phases]
        memory[f"peak in {section}"] = float(counted.peaks[section]), max(at)
    peaks = [memory[f"peak in {section}"] for section in SECTIONS]
    memory["peak"] = max(one for one, _ in peaks), max(one for _, one in peaks)
    return Compared(sent, memory)


def _sum(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    both = list(pairs)
    return sum(counted for counted, _ in both), sum(planned for _, planned in both)


def _off(counted: float, planned: float) -> float:
    return planned / counted - 1 if counted else 0.0


def _named(setting: Setting) -> list[str]:
    ranks, stage, placement, chunks = setting
    return [f"{ranks:,}", str(stage), placement, str(chunks)]


def print_bytes(compared: dict[Setting, Compared]) -> None:
    """What a rank sends, counted and planned."""
    rows = []
    for setting, one in compared.items():
        counted, planned = _sum(one.sent.values())
        of_loss, _ = _sum(one.sent[name] for name in LOSS if name in one.sent)
        _ranks, _, _placement, _ = setting
        rows.append([*_named(setting), *(f"{x / MIB:,.1f}" for x in (counted, planned)), f"{one.off['sent']:+.1%}"])
        rows[-1] += [f"{of_loss / MIB:,.1f}", f"{one.off['sent for the loss']:+.1%}"]
    columns = ["GPUs", "ZeRO", "placement", "chunks", "MiB sent", "planned", "off", "of it for the loss", "off "]
    print_table("what a rank sends in a step: counted, and by rerankvpr plan", columns, rows)


def print_memory(compared: dict[Setting, Compared]) -> None:
    """What a rank holds, counted and planned."""
    rows = []
    for setting, one in compared.items():
        row = _named(setting)
        for counted, planned in one.memory.values():
            row.append(f"{counted / MIB:,.0f} {_off(counted, planned):+.1%}")
        rows.append(row)
    names = list(next(iter(compared.values())).memory)
    print_table(
        "memory of a rank on its device, MiB, and how far rerankvpr plan is off",
        ["GPUs", "ZeRO", "placement", "chunks", *names],
        rows,
    )


def print_collectives(setting: Setting, counted: Simulated) -> None:
    """Each collective operation of a step: how often, how much, and where."""
    rows: Counter[tuple[str, str, str, int]] = Counter()
    for sent, count in counted.sent.items():
        rows[sent.kind, sent.section, sent.place, sent.num_bytes] += count
    title = "collective operations of a step: " + ", ".join(
        f"{name} {value}" for name, value in zip(("GPUs", "ZeRO", "placement", "chunks"), _named(setting), strict=True)
    )
    lines = [
        [kind, section, place, str(count), f"{num_bytes / MIB:,.3f}"]
        for (kind, section, place, num_bytes), count in sorted(rows.items())
    ]
    print_table(title, ["kind", "section", "place", "calls", "MiB of each"], lines)


def print_scaling(
    times: dict[Setting, StepTime], with_overlap: dict[Setting, StepTime], images: int
) -> dict[str, float]:
    """Time of a step on H100s, on paper, and images/s per GPU as a share of those of the fewest GPUs; the shares.

    `with_overlap` are the times of the same steps with engine.overlap, which sends the same in smaller buckets.
    """
    rows, shares = [], {}
    for setting, time in times.items():
        _ranks, stage, placement, chunks = setting
        fewest = times[min(one[0] for one in times), stage, placement, chunks]
        share = fewest.total / time.total
        shares["/".join(map(str, setting))] = share
        purposes = {
            "gradients": ("gradients, reduced", "norm and overflow"),
            "weights": ("weights, after the update", "weights, gathered for use"),
            "loss": (*LOSS, "figures and votes"),
        }
        sending = [sum(time.sending.get(name, 0.0) for name in names) for names in purposes.values()]
        milliseconds = [time.network, time.loss, *sending, time.overlapped, time.total]
        rows.append([*_named(setting), *(f"{1e3 * x:.2f}" for x in milliseconds)])
        rows[-1] += [f"{images / time.total:,.0f}", f"{share:.1%}"]
        rows[-1] += [f"{fewest.total / with_overlap[setting].total:.1%}"]
    columns = ["GPUs", "ZeRO", "placement", "chunks", "network, ms", "loss, ms", "gradients sent, ms"]
    columns += ["weights sent, ms", "loss sent, ms", "hidden, ms", "step, ms", "images/s per GPU", "weak scaling"]
    columns += ["with overlap"]
    print_table("a step on H100s, on paper (benchmarks/links.py has the assumptions)", columns, rows)
    return shares


def print_shortened(counted: dict[Setting, Simulated], times: dict[Setting, StepTime]) -> dict[str, float]:
    """What the gather of descriptors and its way back would take otherwise, on paper; milliseconds by name.

    It is the same at each stage, placement and number of chunks.
    """
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    first = {one[0]: one for one in reversed(counted)}
    for ranks, setting in sorted(first.items()):
        found = shortened(counted[setting], Cluster())
        milliseconds = [f"{1e3 * x:.2f}" for x in (times[setting].total, *found.values())]
        rows.append([f"{ranks:,}", *milliseconds])
        figures |= {f"{ranks}/gather_ms/{name}": 1e3 * seconds for name, seconds in found.items()}
    title = "descriptors gathered and their gradients scattered, ms of a step on paper: as it is, and as it could be"
    print_table(title, ["GPUs", "step, ms", "as it is", "in two levels", "16 bits out", "both"], rows)
    return figures


def main(options: Options) -> dict[str, float]:
    """Counts, prints the tables and returns the figures."""
    order = itertools.product(options.zero_stages, options.placements, options.chunks, sorted(options.gpus))
    settings: list[Setting] = [(ranks, stage, placement, chunks) for stage, placement, chunks, ranks in order]
    recipes = {setting: recipe_of(options, setting) for setting in settings}
    counted = simulate_all(recipes)
    also = {one: recipe_of(replace(options, overlap=True), one) for one in settings if one[1] in (1, 2)}
    overlapped = counted | ({} if options.overlap else simulate_all(also))
    sizes = parameter_sizes(recipes[settings[0]])
    compared = {setting: compare(recipes[setting], setting[0], sizes, counted[setting]) for setting in settings}
    times, with_overlap = (
        {one: step_time(steps[one], Cluster(), zero_stage=one[1], overlap=overlap) for one in settings}
        for steps, overlap in ((counted, options.overlap), (overlapped, True))
    )
    if options.collectives:
        for setting in settings:
            print_collectives(setting, counted[setting])
    print_bytes(compared)
    print_memory(compared)
    shares = print_scaling(times, with_overlap, 4 * options.places)
    figures = {f"{name}/weak_scaling": share for name, share in shares.items()} | print_shortened(counted, times)
    for setting, one in compared.items():
        name = "/".join(map(str, setting))
        for what, pairs in (("sent", one.sent), ("memory", one.memory)):
            for part, (found, planned) in pairs.items():
                figures |= {f"{name}/{what}/{part}": found, f"{name}/{what}/{part}/planned": planned}
        for placement in {setting[2]}:
            batch = options.places * 4 * setting[0]
            formula = bytes_of_loss(setting[0], batch, sizes.descriptor, placement) / setting[0]
            figures[f"{name}/sent/loss/by_memory_scaling"] = formula
        figures[f"{name}/step_ms"] = 1e3 * times[setting].total
        figures[f"{name}/step_ms_with_overlap"] = 1e3 * with_overlap[setting].total
    write_json(options.json, figures)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Options))
