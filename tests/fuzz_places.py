"""Readers of shard sets and of what they are made from, each with valid files to mutate; see tests/fuzzing.py."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs.files import file_sha256
from configs.schema import Recipe
from data_pipeline.index import INDEX, digest_line, read_index, read_table, write_table
from data_pipeline.loader import PlaceLoader, TooManyBadImagesError, _Step
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.sources.manifest import read_manifest
from data_pipeline.sources.msls import read_msls
from data_pipeline.verify import verify_shards
from tests.fuzzing import Reader
from tests.photos import jpeg, write_gsv_cities

# Shard sets.


def _shard_set(folder: Path) -> list[Path]:
    write_gsv_cities(folder / "native", {"Oslo": {3: 4, 12: 5}, "Alta": {0: 6}})
    write_shards(read_gsv_cities(folder / "native"), folder / "set", ShardOptions(shard_bytes=6000))
    return [folder / "set" / INDEX]


def _without_digest(file: Path) -> None:
    (file.parent / f"{INDEX}.sha256").write_bytes(digest_line(file_sha256(file)))


def _read_index(folder: Path, file: Path) -> bool:
    index = read_index(folder / "set")
    index.table.to_pylist()
    for place in range(index.num_places):
        index.place_range(place)
    return False


def _rewritten(file: Path) -> None:
    """Every other mutation of an index is of its values: the table is written again with one cell or column changed."""
    _without_digest(file)


def _index_values(folder: Path) -> list[Path]:
    """The index as JSON, which `_index_from_json` makes a Parquet file of: mutations reach its values."""
    _shard_set(folder)
    table, said = read_table(folder / "set" / INDEX)
    (folder / "set" / "index.json").write_text(json.dumps({"said": said, "rows": table.to_pylist()}))
    return [folder / "set" / "index.json"]


def _index_from_json(file: Path) -> None:
    try:
        content, schema = json.loads(file.read_text()), read_table(file.parent.parent / "set" / INDEX)[0].schema
        said, table = content["said"], pa.Table.from_pylist(content["rows"], schema=schema)
    except Exception:  # noqa: BLE001 - no table can hold it: the index stays as the last mutation left it
        return
    write_table(file.parent / INDEX, table, said)
    _without_digest(file.parent / INDEX)


def _make_tars(folder: Path) -> list[Path]:
    _shard_set(folder)
    return sorted((folder / "set" / "shards").glob("*.tar"))


def _read_tars(folder: Path, file: Path) -> bool:
    """Both ways that tars are read: checked whole, and by a training."""
    faults = verify_shards(folder / "set")
    if not all(str(fault) and "\n" not in str(fault) for fault in faults):
        raise AssertionError(f"a fault of more than one line: {faults}")
    index = read_index(folder / "set")
    data = Recipe().data.model_copy(update={"image_size": 14, "decode_threads": 0, "max_bad_images": 10**6})
    loader = PlaceLoader(index, data, rank=0, world_size=1)
    for place in range(index.num_places):
        planned = index.place_range(place)
        views_K = np.arange(len(planned.sizes))
        out_K3HW = torch.empty(len(views_K), 3, 14, 14, dtype=torch.uint8)
        step = _Step(np.array([place]), views_K[None], [planned], np.array([place]), views_K[None])
        try:
            loader._decode_place(step, 0, loader._read(planned), out_K3HW)
        except TooManyBadImagesError as error:
            raise ValueError(str(error)) from error  # a training's boundary takes it for the user's
    return bool(faults)


def _rows(folder: Path) -> list[Path]:
    """What an interrupted sharding left: a tar's index rows."""
    _shard_set(folder)
    native = read_gsv_cities(folder / "native")
    write_shards(native, folder / "half", ShardOptions(shard_bytes=6000), part=(0, 2))
    return sorted((folder / "half" / "shards").glob("*.rows.parquet"))


def _read_rows(folder: Path, file: Path) -> bool:
    write_shards(read_gsv_cities(folder / "native"), folder / "half", ShardOptions(shard_bytes=6000), part=(0, 2))
    return False


# Sources.


def _gsv(folder: Path) -> list[Path]:
    write_gsv_cities(folder, {"Oslo": {3: 4, 12: 5}, "Alta": {0: 6}})
    return sorted((folder / "Dataframes").glob("*.csv"))


def _read_gsv(folder: Path, file: Path) -> bool:
    read_gsv_cities(folder)
    return False


def msls_folder(folder: Path, cities: tuple[str, ...]) -> list[Path]:
    rng, files = np.random.default_rng(0), []
    for city in cities:
        for part in ("database", "query"):
            here = folder / "train_val" / city / part
            (here / "images").mkdir(parents=True)
            keys = [f"{city}-{part}-{n}" for n in range(8)]
            east = [500000.0 + n for n in range(8)]
            post = {"key": keys, "easting": east, "northing": 4e6 + rng.random(8), "view_direction": "Forward"}
            pd.DataFrame(post).to_csv(here / "postprocessed.csv")
            about = {"lon": 10.0, "lat": 50.0, "ca": 90.5, "captured_at": "2019-05-01", "pano": [False] * 7 + [True]}
            pd.DataFrame({"key": keys, **about}).to_csv(here / "raw.csv")
            for key in keys:
                (here / "images" / f"{key}.jpg").write_bytes(jpeg(rng))
            files += [here / "postprocessed.csv", here / "raw.csv"]
    return files


def _read_msls_source(folder: Path, file: Path) -> bool:
    read_msls(folder, min_images_per_place=1)
    return False


def table(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    with (folder / "table.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet", compression="none")
    (folder / "values.json").write_text(json.dumps(rows))
    return [folder / "table.csv", folder / "table.parquet", folder / "values.json"]


def values_to_parquet(file: Path) -> None:
    if file.name != "values.json":
        return
    try:
        table = pa.Table.from_pylist(json.loads(file.read_text()))
        pq.write_table(table, file.with_name("table.parquet"), compression="none")
    except Exception:  # noqa: BLE001 - no table can hold it
        return


def _source_table(folder: Path) -> list[Path]:
    rows = [
        {
            "path": f"{n}.jpg",
            "place": n // 4,
            "city": "a",
            "lat": 50.0,
            "lon": 1.0,
            "year": 2020,
            "month": 5,
            "northdeg": 9,
        }
        for n in range(8)
    ]
    return table(folder, rows)


def table_by(read: Callable[[Path], object]) -> Callable[[Path, Path], bool]:
    def read_one(folder: Path, file: Path) -> bool:
        read(folder / ("table.csv" if file.suffix == ".csv" else "table.parquet"))
        return False

    return read_one


READERS: dict[str, Reader] = {
    "index": Reader(_shard_set, _read_index, _without_digest),
    "index values": Reader(_index_values, _read_index, _index_from_json, lambda _: [INDEX]),
    "tars": Reader(_make_tars, _read_tars),
    "unfinished tars": Reader(_rows, _read_rows),
    "GSV-Cities": Reader(_gsv, _read_gsv),
    "MSLS, training": Reader(lambda f: msls_folder(f, ("a",)), _read_msls_source),
    "table of places": Reader(
        _source_table,
        table_by(lambda file: read_manifest(file, min_images_per_place=1)),
        values_to_parquet,
        lambda _: ["table.csv", "table.parquet"],
    ),
}
