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
    """One row of the table: what its training changes, how that is evaluated, the row it is held against by query."""

    name: str
    what: str
    changes: Settings = field(default_factory=dict)
    evaluation: str = BASE
    stages: tuple[str, ...] = (RETRIEVED, RERANKED)  # that this row can change
    against: str = BASE

    @property
    def training(self) -> str:
        """The name of its training: its own if it changes something."""
        return self.name if self.changes else BASE


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
    steps: int
    seeds: int
    learning_rates: tuple[float, ...]  # of the trainings whose drift is measured
    drift: Settings
    judged: tuple[Judged, ...]
    evaluations: Mapping[str, Settings]
    rows: tuple[Row, ...]

    @property
    def trainings(self) -> dict[str, Settings]:
        """What each training changes, by its name."""
        return {row.training: row.changes for row in self.rows}

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
QUEUE_ROWS = (
    Row("no-queue", "no queue", {"memory.size": 0}),
    Row("decay-0", "queue, no decay", {"memory.decay_lambda": 0.0}),
    Row("decay-0.5", "queue, decay 0.5", {"memory.decay_lambda": 0.5}),
    Row("decay-0.02", "queue, decay 0.02", {"memory.decay_lambda": 0.02}),
    Row("decay-measured", "queue, decay measured", {"memory.decay": "measured", "memory.drift_every": 5}),
)
GUIDED_ROWS = (
    Row("guided-0.1", "guided matching loss, weight 0.1", {"loss.guided_weight": 0.1}),
    Row("guided-0.5", "guided matching loss, weight 0.5", {"loss.guided_weight": 0.5}),
)
BICUBIC = Row("bicubic", "bicubic, in training and test", {"data.interpolation": "bicubic"})
RERANK_ROWS = (
    Row("original-rule", "re-ranked by the rule of RerankVPR's code", evaluation="original-rule", stages=(RERANKED,)),
    Row("auto", "rerank.when auto", evaluation="auto", stages=(RERANKED,)),
    Row("adaptive", "rerank.when adaptive", evaluation="adaptive", stages=(RERANKED,)),
    Row("saliency-weights", "matches weighted by saliency", evaluation="saliency-weights", stages=(RERANKED,)),
)

PLACES = Plan(
    recipe="mini_vits",
    about="ViT-S/14 fine-tuned on 210 places of real photographs",
    base={"trainer.epochs": 1000, "memory.start_epoch": 0.5, "trainer.validate_every_epochs": 0},
    steps=60,
    seeds=5,
    learning_rates=(1e-5, 4e-5, 1e-4, 4e-4),
    drift={"memory.size": 1280, "memory.drift_every": 2, "memory.drift_images": 80, "memory.start_epoch": 0},
    judged=(
        Judged(
            *("gardens", "gardens_point/all/100-199", "gardens_point/"),
            "Gardens Point, frames 100-199, six pairs pooled",
        ),
        Judged("views", "manifest:{views}", "held_out_views", "Held-out views of Tower and Facades"),
    ),
    evaluations={BASE: {}, **RERANK_EVALUATIONS, "322": {"image_size": 322}},
    rows=(
        Row(BASE, "queue of 512, decay 0.1, 8 places a batch, cls, last 4 blocks, bilinear, 224 -> 224"),
        *QUEUE_ROWS,
        Row("once", "Gardens' places once an epoch, not 7 times", {"data.repeat": {}}),
        Row(
            "hard-places",
            "half of the steps of hard places",
            {"data.repeat": {}, "data.hard_share": 0.5},
            against="once",
        ),
        *GUIDED_ROWS,
        Row("gem", "aggregator gem", {"model.aggregator": "gem"}),
        Row("salad", "aggregator salad", {"model.aggregator": "salad"}),
        Row("boq", "aggregator boq", {"model.aggregator": "boq"}),
        Row("tokens", "aggregator tokens", {"model.aggregator": "tokens"}),
        Row("places-4", "4 places a batch", {"data.places_per_batch": 4, "memory.start_epoch": 0.25}),
        Row(
            "sub-batches",
            "a sub-batch and a loss for each of the three kinds of places",
            {**_of_sets({"Gardens": 3, "Tower": 3, "Facades": 2}), "memory.start_epoch": 0.33},
        ),
        Row("lora", "LoRA beside q and v of the last 4 blocks", {"model.finetune": "lora"}),
        Row("last-2", "last 2 blocks trained", {"model.finetune_last_n_blocks": 2}),
        Row("last-8", "last 8 blocks trained", {"model.finetune_last_n_blocks": 8}),
        BICUBIC,
        Row("test-322", "224 -> 322", evaluation="322"),
        *RERANK_ROWS,
    ),
)

TOWN = Plan(
    recipe="demo",
    about="a ViT of 4 blocks, from random weights, on a rendered town of 360 places",
    base={"trainer.epochs": 1000, "memory.start_epoch": 2, "memory.size": 1440, "trainer.validate_every_epochs": 0},
    steps=250,
    seeds=10,
    learning_rates=(2e-4, 1e-3, 2e-3, 5e-3),
    drift={"memory.size": 5760, "memory.drift_every": 2, "memory.drift_images": 80, "memory.start_epoch": 0},
    judged=(Judged("town", "town", "town", "Held-out places of the town"),),
    evaluations={BASE: {}, **RERANK_EVALUATIONS, "112": {"image_size": 112}},
    rows=(
        Row(BASE, "queue of 1,440, decay 0.1, 36 places a batch, mixed, gem, all 4 blocks, bilinear, 84 -> 84"),
        *QUEUE_ROWS,
        Row("start-4", "queue from epoch 4 on, not 2", {"memory.start_epoch": 4}),
        Row("min-negative", "no negatives within 150 m: the next houses", {"memory.min_negative_m": 150.0}),
        Row(
            "hard-places",
            "half of the steps of hard places, 25 m apart",
            {"data.hard_share": 0.5, "data.hard_min_m": 25.0},
        ),
        *GUIDED_ROWS,
        Row("cls", "aggregator cls", {"model.aggregator": "cls"}),
        Row(
            "salad",
            "aggregator salad, 16 clusters",
            {"model.aggregator": "salad", "model.aggregator_args": {"clusters": 16, "cluster_dim": 32}},
        ),
        Row(
            "boq",
            "aggregator boq, 16 queries",
            {"model.aggregator": "boq", "model.aggregator_args": {"channels": 128, "queries": 16, "rows": 8}},
        ),
        Row("tokens", "aggregator tokens", {"model.aggregator": "tokens", "model.aggregator_args": {"block": -2}}),
        Row(
            "sub-batches",
            "a sub-batch and a loss for each of the three districts",
            _of_sets({"Harbour": 12, "Hillside": 12, "Oldtown": 12}),
        ),
        Row("city", "batches of one district", {"data.composition": "city"}),
        Row("places-8", "8 places a batch", {"data.places_per_batch": 8, "memory.start_epoch": 0.5}),
        Row("places-16", "16 places a batch", {"data.places_per_batch": 16, "memory.start_epoch": 1}),
        Row("last-2", "last 2 of 4 random blocks trained", {"model.finetune_last_n_blocks": 2}),
        BICUBIC,
        Row("test-112", "84 -> 112", evaluation="112"),
        *RERANK_ROWS,
    ),
)

PLANS = {"places": PLACES, "town": TOWN}
