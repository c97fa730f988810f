"""What `benchmarks.ablation` runs: the trainings and evaluations of each set, and the rows that they make.

Rows stand in the order in which they are worth knowing, and their trainings run in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.schema.data import NO_SET

Settings = Mapping[str, Any]  # values by key, `section.key` of a recipe or a key of its eval section

BASE = "base"
RETRIEVED, RERANKED = "retrieved", "re-ranked"


@dataclass(frozen=True)
class Row:
    """One row of the table: a training, how it is evaluated, and the row that it is held against, query by query."""

    name: str
    what: str
    training: str = BASE
    evaluation: str = BASE
    stages: tuple[str, ...] = (RETRIEVED, RERANKED)  # that this row can change
    against: str = BASE


@dataclass(frozen=True)
class Judged:
    """Benchmarks whose queries are pooled: a spec of them, with {views} for a manifest, and how their names begin."""

    name: str
    spec: str
    prefix: str
    what: str


@dataclass(frozen=True)
class Plan:
    """A set: its recipe, and what its rows change of it."""

    recipe: str
    about: str
    base: Settings
    judged: tuple[Judged, ...]
    trainings: Mapping[str, Settings]
    evaluations: Mapping[str, Settings]
    rows: tuple[Row, ...]
    steps: int
    seeds: int
    learning_rates: tuple[float, ...] = ()  # of the trainings whose drift is measured
    drift: Settings = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of a name. Raises ValueError naming those that there are."""
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise ValueError(f"no row {name!r}; rows are {', '.join(found)}")
        return found[name]


def _of_sets(places: Mapping[str, int]) -> dict[str, Any]:
    """Composition `sets`: a shard set for each city, which `benchmarks.ablation` makes and fills in."""
    return {
        "data.composition": "sets",
        "data.shards": NO_SET,
        "data.repeat": {},
        "data.sets": {city: city for city in places},
        "data.set_places": dict(places),
    }


ORIGINAL_RULE = {
    "rerank.top_k": 10,
    "rerank.saliency_thresh": 0.3,
    "rerank.nn_match_thresh": 0.65,
    "rerank.geometry": "none",
    "rerank.global_weight": 0.0,
}
RERANK_EVALUATIONS: dict[str, Settings] = {
    "original-rule": ORIGINAL_RULE,
    "auto": {"rerank.when": "auto"},
    "adaptive": {"rerank.when": "adaptive"},
    "saliency-weights": {"rerank.match_weight": "saliency"},
}
QUEUE_TRAININGS: dict[str, Settings] = {
    "no-queue": {"memory.size": 0},
    "decay-0": {"memory.decay_lambda": 0.0},
    "decay-0.5": {"memory.decay_lambda": 0.5},
    "decay-0.02": {"memory.decay_lambda": 0.02},
    "decay-measured": {"memory.decay": "measured", "memory.drift_every": 5},
}
QUEUE_ROWS = (
    Row("no-queue", "no queue", "no-queue"),
    Row("decay-0", "queue, no decay", "decay-0"),
    Row("decay-0.5", "queue, decay 0.5", "decay-0.5"),
    Row("decay-0.02", "queue, decay 0.02", "decay-0.02"),
    Row("decay-measured", "queue, decay measured", "decay-measured"),
)
RERANK_ROWS = (
    Row("original-rule", "re-ranked by the original's rule", evaluation="original-rule", stages=(RERANKED,)),
    Row("auto", "rerank.when auto", evaluation="auto", stages=(RERANKED,)),
    Row("adaptive", "rerank.when adaptive", evaluation="adaptive", stages=(RERANKED,)),
    Row("saliency-weights", "matches weighted by saliency", evaluation="saliency-weights", stages=(RERANKED,)),
)

PLACES = Plan(
    recipe="mini_vits",
    about="ViT-S/14 fine-tuned on 210 places of real photographs",
    base={"trainer.epochs": 1000, "memory.start_epoch": 0.5, "trainer.validate_every_epochs": 0},
    judged=(
        Judged(
            *("gardens", "gardens_point/all/100-199", "gardens_point/"),
            "Gardens Point, frames 100-199, six pairs pooled",
        ),
        Judged("views", "manifest:{views}", "held_out_views", "Held-out views of Tower and Facades"),
    ),
    trainings={
        BASE: {},
        **QUEUE_TRAININGS,
        "once": {"data.repeat": {}},
        "hard-places": {"data.repeat": {}, "data.hard_share": 0.5},
        "guided-0.1": {"loss.guided_weight": 0.1},
        "guided-0.5": {"loss.guided_weight": 0.5},
        "gem": {"model.aggregator": "gem"},
        "salad": {"model.aggregator": "salad"},
        "boq": {"model.aggregator": "boq"},
        "tokens": {"model.aggregator": "tokens"},
        "places-4": {"data.places_per_batch": 4, "memory.start_epoch": 0.25},
        "sub-batches": {**_of_sets({"Gardens": 3, "Tower": 3, "Facades": 2}), "memory.start_epoch": 0.33},
        "lora": {"model.finetune": "lora"},
        "last-2": {"model.finetune_last_n_blocks": 2},
        "last-8": {"model.finetune_last_n_blocks": 8},
        "bicubic": {"data.interpolation": "bicubic"},
    },
    evaluations={BASE: {}, **RERANK_EVALUATIONS, "322": {"image_size": 322}},
    rows=(
        Row(BASE, "queue of 512, decay 0.1, 8 places a batch, cls, last 4 blocks, bilinear, 224 -> 224"),
        *QUEUE_ROWS,
        Row("once", "Gardens' places once an epoch, not 7 times", "once"),
        Row("hard-places", "half of the steps of hard places", "hard-places", against="once"),
        Row("guided-0.1", "guided matching loss, weight 0.1", "guided-0.1"),
        Row("guided-0.5", "guided matching loss, weight 0.5", "guided-0.5"),
        Row("gem", "aggregator gem", "gem"),
        Row("salad", "aggregator salad", "salad"),
        Row("boq", "aggregator boq", "boq"),
        Row("tokens", "aggregator tokens", "tokens"),
        Row("places-4", "4 places a batch", "places-4"),
        Row("sub-batches", "a sub-batch and a loss for each of the three kinds of places", "sub-batches"),
        Row("lora", "LoRA beside q and v of the last 4 blocks", "lora"),
        Row("last-2", "last 2 blocks trained", "last-2"),
        Row("last-8", "last 8 blocks trained", "last-8"),
        Row("bicubic", "bicubic, in training and test", "bicubic"),
        Row("test-322", "224 -> 322", evaluation="322"),
        *RERANK_ROWS,
    ),
    steps=60,
    seeds=5,
    learning_rates=(1e-5, 4e-5, 1e-4, 4e-4),
    drift={"memory.size": 1280, "memory.drift_every": 2, "memory.drift_images": 80, "memory.start_epoch": 0},
)

TOWN = Plan(
    recipe="demo",
    about="a ViT of 4 blocks, from random weights, on a rendered town of 360 places",
    base={"trainer.epochs": 1000, "memory.start_epoch": 2, "memory.size": 1440, "trainer.validate_every_epochs": 0},
    judged=(Judged("town", "town", "town", "Held-out places of the town"),),
    trainings={
        BASE: {},
        **QUEUE_TRAININGS,
        "start-4": {"memory.start_epoch": 4},
        "min-negative": {"memory.min_negative_m": 150.0},
        "hard-places": {"data.hard_share": 0.5, "data.hard_min_m": 25.0},
        "guided-0.1": {"loss.guided_weight": 0.1},
        "guided-0.5": {"loss.guided_weight": 0.5},
        "cls": {"model.aggregator": "cls"},
        "salad": {"model.aggregator": "salad", "model.aggregator_args": {"clusters": 16, "cluster_dim": 32}},
        "boq": {"model.aggregator": "boq", "model.aggregator_args": {"channels": 128, "queries": 16, "rows": 8}},
        "tokens": {"model.aggregator": "tokens", "model.aggregator_args": {"block": -2}},
        "sub-batches": _of_sets({"Harbour": 12, "Hillside": 12, "Oldtown": 12}),
        "city": {"data.composition": "city"},
        "places-8": {"data.places_per_batch": 8, "memory.start_epoch": 0.5},
        "places-16": {"data.places_per_batch": 16, "memory.start_epoch": 1},
        "last-2": {"model.finetune_last_n_blocks": 2},
        "bicubic": {"data.interpolation": "bicubic"},
    },
    evaluations={BASE: {}, **RERANK_EVALUATIONS, "112": {"image_size": 112}},
    rows=(
        Row(BASE, "queue of 1,440, decay 0.1, 36 places a batch, mixed, gem, all 4 blocks, bilinear, 84 -> 84"),
        *QUEUE_ROWS,
        Row("start-4", "queue from epoch 4 on, not 2", "start-4"),
        Row("min-negative", "no negatives within 150 m: the next houses", "min-negative"),
        Row("hard-places", "half of the steps of hard places, 25 m apart", "hard-places"),
        Row("guided-0.1", "guided matching loss, weight 0.1", "guided-0.1"),
        Row("guided-0.5", "guided matching loss, weight 0.5", "guided-0.5"),
        Row("cls", "aggregator cls", "cls"),
        Row("salad", "aggregator salad, 16 clusters", "salad"),
        Row("boq", "aggregator boq, 16 queries", "boq"),
        Row("tokens", "aggregator tokens", "tokens"),
        Row("sub-batches", "a sub-batch and a loss for each of the three districts", "sub-batches"),
        Row("city", "batches of one district", "city"),
        Row("places-8", "8 places a batch", "places-8"),
        Row("places-16", "16 places a batch", "places-16"),
        Row("last-2", "last 2 of 4 random blocks trained", "last-2"),
        Row("bicubic", "bicubic, in training and test", "bicubic"),
        Row("test-112", "84 -> 112", evaluation="112"),
        *RERANK_ROWS,
    ),
    steps=250,
    seeds=10,
    learning_rates=(2e-4, 1e-3, 2e-3, 5e-3),
    drift={"memory.size": 5760, "memory.drift_every": 2, "memory.drift_images": 80, "memory.start_epoch": 0},
)

PLANS = {"places": PLACES, "town": TOWN}
