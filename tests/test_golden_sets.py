"""Golden curves of composition `sets`: a loss for each of two towns, the same at any world size, stage and placement.

`tests/golden/sets.json` holds loss and gradient norm of each step; see tests/test_golden.py for how it is written anew.
"""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town
from tests.curves import check_golden, curve, folder_of_trainings, steps_of
from tests.ranks import on_ranks
from tests.town_shards import town_recipe

pytestmark = pytest.mark.slow

STEPS = 10


def write_two_towns(folder: Path) -> None:
    """The shards of two towns, one of 24 places and one of 9."""
    if dist.get_rank() == 0:
        for name, seed, places in (("large", 3, 24), ("small", 5, 9)):
            render_town(folder / name, Town(seed=seed, places=places, views=3, held_out_places=0), processes=1)
            write_shards(read_gsv_cities(folder / name / "train", min_images_per_place=3), folder / f"{name}_shards")
    dist.barrier()


def check_sets_are_golden() -> None:
    """The queue comes in the middle of an epoch of 6 steps; the small town begins a new round every 2."""
    layout: dict[str, Any] = {
        1: {"engine": {"zero_stage": 1}},
        2: {"engine": {"zero_stage": 0, "encode_chunks": 3}, "memory": {"placement": "sharded"}},
        4: {"engine": {"zero_stage": 2}, "memory": {"placement": "sharded"}},
    }[dist.get_world_size()]
    memory = {"size": 60, "start_epoch": 0.5, **layout.get("memory", {})}
    kinds: dict[str, dict[str, Any]] = {
        "set": {"loss": {"set_weights": {"small": 0.5}}},
        "all": {"memory": {"queue_over": "all", "min_negative_m": 150}, "loss": {}},
    }
    with folder_of_trainings() as folder:
        write_two_towns(folder)
        sets = {"large": str(folder / "large_shards"), "small": str(folder / "small_shards")}
        data = {"shards": "data/shards", "composition": "sets", "sets": sets, "sub_batch": "mixed"}
        curves = {
            name: curve(
                folder,
                name,
                town_recipe(
                    data=data,
                    memory=memory | kind.get("memory", {}),
                    loss=kind["loss"],
                    engine=layout["engine"],
                    trainer={"max_steps": STEPS},
                ),
            )
            for name, kind in kinds.items()
        }
        logged = steps_of(folder / "all")
        dist.barrier()
    check_golden("sets.json", curves, STEPS)
    assert logged[-1]["train/near_negatives"] > 0
    for line in logged:
        parts = line["train/large/loss"] + line["train/small/loss"]
        assert line["train/loss"] == pytest.approx(parts, rel=1e-5)


test_on_ranks = on_ranks(__file__)
