"""The shards of the town that golden curves are of."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town
from tests.forked import scratch


def town_of_24() -> Path:
    """The shard set of 24 places with three views, rendered at the first call, by one rank at a time."""
    place = scratch() / "town_of_24"
    if not (place / "shards" / "index.parquet").exists():
        render_town(place / "town", Town(seed=3, places=24, views=3, held_out_places=0), processes=1)
        write_shards(read_gsv_cities(place / "town" / "train", min_images_per_place=3), place / "shards")
    return place / "shards"
