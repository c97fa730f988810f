"""Trainings that read whole tars: the losses of one rank on two and four, and after a resume inside an epoch.

`tests/golden/stream.json` holds loss and gradient norm of each step; see tests/test_golden.py for how it is written
anew.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.curves import check_golden, curve, folder_of_trainings
from tests.photos import write_gsv_cities
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

STEPS, STOPPED_AT = 8, 3  # an epoch has five


def check_streams_give_golden_losses_on_any_ranks_and_after_a_resume() -> None:
    with folder_of_trainings() as folder:
        if dist.get_rank() == 0:
            cities = {"Aachen": dict.fromkeys(range(25), 4), "Bergen": dict.fromkeys(range(18), 5)}
            write_gsv_cities(folder / "native", cities)
            write_shards(read_gsv_cities(folder / "native"), folder / "shards", ShardOptions(shard_bytes=20_000))
        dist.barrier()

        def recipe(max_steps: int) -> dict[str, Any]:
            return {
                "data": {
                    **{"shards": str(folder / "shards"), "places_per_batch": 8, "images_per_place": 3},
                    **{"image_size": 28, "composition": "mixed", "decode_threads": 1},
                    **{"access": "stream", "stream_buffer_places": 24},
                },
                "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2},
                "memory": {"size": 50, "start_epoch": 0},
                "optim": {"lr": 1e-3, "warmup_steps": 2},
                "trainer": {"epochs": 99, "max_steps": max_steps, "validate_every_epochs": 0},
                "tracking": {"enabled": False},
            }

        straight = curve(folder, "straight", recipe(STEPS))
        curve(folder, "stopped", recipe(STOPPED_AT))
        resumed = curve(folder, "stopped", recipe(STEPS), resume=True)
    assert resumed == straight  # bitwise, the layout being equal
    check_golden("stream.json", {"straight": straight}, STEPS)


test_on_ranks = on_ranks(__file__)
