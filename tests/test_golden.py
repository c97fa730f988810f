"""Golden curves: 30 steps of a small ViT on the town, the same at any world size, ZeRO stage and way of holding it.

`tests/golden/town.json` holds loss and gradient norm of each step, `aggregators.json` those of a few steps of each
further aggregator and backbone family, `hard_places.json` those of epochs with hard places. A change of the mathematics
shows here, and is made known by writing the files anew: RERANKVPR_WRITE_GOLDEN=1 python -m pytest tests/test_golden.py.
"""

from typing import Any

import pytest
import torch.distributed as dist

from tests.curves import check_golden, curve, folder_of_trainings
from tests.networks import AGGREGATORS
from tests.ranks import on_ranks
from tests.town_shards import STEPS, town_recipe, wait_for_the_town

pytestmark = pytest.mark.slow


def check_thirty_steps_are_golden() -> None:
    wait_for_the_town()
    layouts: dict[str, dict[str, Any]] = {
        "zero1": {"engine": {"zero_stage": 1}},
        "zero0_sharded": {"engine": {"zero_stage": 0}, "memory": {"placement": "sharded"}},
        "zero2_chunks": {"engine": {"zero_stage": 2, "encode_chunks": 3}},
        "zero3_offload": {"engine": {"zero_stage": 3, "offload": "all", "activation_checkpointing": True}},
    }
    with folder_of_trainings() as folder:
        curves = {name: curve(folder, name, town_recipe(**changes)) for name, changes in layouts.items()}
        saves_often = {"trainer": {"checkpoint_every_steps": 3}}
        again = curve(folder, "again", town_recipe(**layouts["zero1"], **saves_often))
    assert again == curves["zero1"]  # bitwise, the layout being equal
    check_golden("town.json", curves, STEPS)


def check_aggregators_are_golden() -> None:
    """Another layout at each world size: all agree with the curve that one rank wrote at stage 1."""
    wait_for_the_town()
    layout = {
        1: {"zero_stage": 1},
        2: {"zero_stage": 3, "offload": "all", "activation_checkpointing": True},
        4: {"zero_stage": 2, "encode_chunks": 2},
    }[dist.get_world_size()]
    heads: dict[str, dict[str, dict[str, Any]]] = {
        "salad": {"model": {"aggregator": "salad", "aggregator_args": AGGREGATORS["salad"]}},
        "boq": {"model": {"aggregator": "boq", "aggregator_args": AGGREGATORS["boq"]}},
        "tokens": {"model": {"aggregator": "tokens", "aggregator_args": {"tokens": 2, "block": -3}}},
        "tiny16": {"model": {"backbone": "tiny16"}, "data": {"image_size": 48}},
    }
    short = {"trainer": {"max_steps": 7}, "engine": layout}
    with folder_of_trainings() as folder:
        curves = {name: curve(folder, name, town_recipe(**changes, **short)) for name, changes in heads.items()}
    check_golden("aggregators.json", curves, 7)


def check_hard_places_are_golden() -> None:
    """Batches chosen by the network's own descriptors: the choice is the same at each world size and layout too."""
    wait_for_the_town()
    layouts = {1: {"zero_stage": 1}, 2: {"zero_stage": 3, "offload": "all"}, 4: {"zero_stage": 2, "encode_chunks": 2}}
    hard = {"places_per_batch": 4, "hard_share": 0.5, "hard_min_m": 150.0}
    layout = layouts[dist.get_world_size()]
    with folder_of_trainings() as folder:
        found = curve(folder, "hard", town_recipe(data=hard, trainer={"max_steps": 14}, engine=layout))
    check_golden("hard_places.json", {"hard": found}, 14)


test_on_ranks = on_ranks(__file__)
