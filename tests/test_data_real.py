"""Real photographs and real metadata, where RERANKVPR_TEST_DATA says that they are."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.plan import Batching, plan_epoch
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.verify import verify_shards


@pytest.fixture(scope="module")
def real_data():
    folder = os.environ.get("RERANKVPR_TEST_DATA")
    if not folder:
        pytest.skip("RERANKVPR_TEST_DATA is unset; it names the folder that holds places_mini")
    return Path(folder)


def test_real_photographs(real_data, tmp_path):
    summary = write_shards(
        read_gsv_cities(real_data / "places_mini"), tmp_path / "set", ShardOptions(shard_bytes=5_000_000)
    )
    assert (summary.places, summary.images, summary.bad) == (210, 1250, [])
    assert verify_shards(tmp_path / "set") == []


def test_real_metadata_gives_the_names_that_the_original_loader_builds(real_data, tmp_path):
    tables = real_data / "gsv_cities_dataframes"
    (tmp_path / "Dataframes").symlink_to(tables)
    listing = read_gsv_cities(tmp_path, min_images_per_place=1)
    assert (listing.num_images, listing.num_places) == (72_599, 8_769)
    names = set()
    for path in tables.glob("*.csv"):
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                month, degrees = row["month"].zfill(2), row["northdeg"].zfill(3)
                name = [row["city_id"], row["place_id"].zfill(7), row["year"].zfill(4), month, degrees]
                names.add(f"Images/{row['city_id']}/{'_'.join([*name, row['lat'], row['lon'], row['panoid']])}.jpg")
    assert set(listing.images["file"].to_pylist()) == names


def test_real_metadata_is_planned_without_photographs(real_data, tmp_path):
    (tmp_path / "Dataframes").symlink_to(real_data / "gsv_cities_dataframes")
    listing = read_gsv_cities(tmp_path)
    views = np.diff(listing.place_starts)
    names = listing.images["city"].to_numpy(zero_copy_only=False)[listing.place_starts[:-1]]
    city = np.searchsorted(listing.cities, names)
    assert listing.num_places + listing.places_left_out == 8_769
    assert views.min() >= 4
    for epoch in range(2):
        plan = plan_epoch(
            city, views, Batching(places_per_batch=120, images_per_place=4, composition="city"), seed=0, epoch=epoch
        )
        assert plan.num_steps == listing.num_places // 120
        assert len(np.unique(plan.places_SP)) == plan.places_SP.size
        of_one_city = (city[plan.places_SP] == city[plan.places_SP][:, :1]).all(axis=1)
        assert of_one_city.sum() >= sum(np.bincount(city) // 120)
