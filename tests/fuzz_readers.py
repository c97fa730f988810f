"""Everything of ours that reads a file, each with valid files to mutate; see tests/fuzzing.py."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.files import file_sha256
from configs.load import load_recipe, load_stored_recipe, recipe_text
from configs.schema import Recipe
from data_pipeline.formats import reads_heic
from data_pipeline.images import read_image
from data_pipeline.index import INDEX, digest_line, read_index, read_table, write_table
from data_pipeline.loader import PlaceLoader, TooManyBadImagesError
from data_pipeline.photos import read_photo
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.sources.manifest import read_manifest
from data_pipeline.sources.msls import read_msls
from data_pipeline.verify import verify_shards
from eval.benchmarks import layouts, matlab
from eval.benchmarks.ground_truth import read_positives
from eval.benchmarks.layouts import netvlad_mat, patch_netvlad, vpr_bench
from eval.benchmarks.lists import gsv_lists
from eval.benchmarks.manifest import manifest
from eval.benchmarks.msls import msls_11k
from eval.features import StoredFeatures, open_folder, shard_is_whole
from model.dinov2 import facebook_layout
from model.network import build_model
from model.weights import infer_backbone
from tests.fuzzing import Reader
from tests.networks import backbone
from tests.photos import jpeg, write_gsv_cities
from tests.stored import store
from trainer.checkpoint import checkpoint_weights
from trainer.checkpoint_folder import MANIFEST, best_recall, find_checkpoint, newest_valid, point
from trainer.export import export_network
from trainer.metrics_log import read_records
from trainer.mlflow_sender import read_state, run_of

TINY = Recipe().model.model_copy(update={"backbone": "tiny14", "weights": "random"})


# Recipes.


def _recipe(folder: Path) -> list[Path]:
    (folder / "recipe.yaml").write_text(recipe_text(Recipe()))
    (folder / "short.yaml").write_text("name: a\ndata: {shards: x, mix: {y: 0.5}}\noptim:\n  milestones: [1, 2]\n")
    return [folder / "recipe.yaml", folder / "short.yaml"]


def _read_recipe(folder: Path, file: Path) -> bool:
    load_recipe(file)
    return False


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
        content = json.loads(file.read_text())
        table = pa.Table.from_pylist(content["rows"], schema=read_table(file.parent.parent / "set" / INDEX)[0].schema)
    except Exception:  # noqa: BLE001 - no table can hold it: the index stays as the last mutation left it
        return
    write_table(file.parent / INDEX, table, content["said"])
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
        try:
            loader._decode_place(place, planned, views_K, loader._read(planned), out_K3HW)
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


def _msls_folder(folder: Path, cities: tuple[str, ...]) -> list[Path]:
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


def _table(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    with (folder / "table.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet", compression="none")
    (folder / "values.json").write_text(json.dumps(rows))
    return [folder / "table.csv", folder / "table.parquet", folder / "values.json"]


def _values_to_parquet(file: Path) -> None:
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
    return _table(folder, rows)


def _table_by(read: Callable[[Path], object]) -> Callable[[Path, Path], bool]:
    def read_one(folder: Path, file: Path) -> bool:
        read(folder / ("table.csv" if file.suffix == ".csv" else "table.parquet"))
        return False

    return read_one


# Benchmarks.


def _images(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(rng))


def _benchmark_table(folder: Path) -> list[Path]:
    _images(folder, [f"{n}.jpg" for n in range(8)])
    rows = [
        {"path": f"{n}.jpg", "role": ("database", "query")[n % 2], "lat": 50.0, "lon": 1.0 + n // 2, "place": n // 2}
        for n in range(8)
    ]
    return _table(folder, rows)


def _ground_truth(folder: Path) -> list[Path]:
    """Arrays of numbers and of objects, as VPR-Bench and gsv-cities publish them."""
    names = [f"{part}/{n}.jpg" for part in ("ref", "query") for n in range(5)]
    _images(folder, names)
    rows = np.empty((5, 2), dtype=object)
    for n in range(5):
        rows[n] = [n, np.array([n, min(n + 1, 4)])]
    np.save(folder / "ground_truth_new.npy", rows, allow_pickle=True)
    ragged = np.empty(5, dtype=object)
    for n in range(5):
        ragged[n] = list(range(n + 1))
    np.save(folder / "s_gt.npy", ragged, allow_pickle=True)
    np.save(folder / "s_dbImages.npy", np.array(names[:5]))
    np.save(folder / "s_qImages.npy", np.array(names[5:]))
    np.save(folder / "square.npy", np.arange(10).reshape(5, 2))
    return [folder / f"{n}.npy" for n in ("ground_truth_new", "s_gt", "s_dbImages", "s_qImages", "square")]


def _read_ground_truth(folder: Path, file: Path) -> bool:
    read_positives(folder / "square.npy")
    benchmarks = [vpr_bench("a", folder, "p"), gsv_lists("b", folder, "s", "p")]
    return any(benchmark.notes for benchmark in benchmarks)


def _mat(folder: Path) -> list[Path]:
    from scipy.io import savemat

    names = [f"images/{n}.jpg" for n in range(4)]
    _images(folder, names)
    (folder / "datasets").mkdir()
    about = {"dbImage": np.array(names, dtype=object), "qImage": np.array(names[:2], dtype=object)}
    about |= {"utmDb": np.arange(8.0).reshape(2, 4), "utmQ": np.arange(4.0).reshape(2, 2), "posDistThr": 25.0}
    savemat(folder / "datasets" / "small.mat", {"dbStruct": about}, do_compression=False)
    savemat(folder / "datasets" / "packed.mat", {"dbStruct": about}, do_compression=True)
    return [folder / "datasets" / "small.mat", folder / "datasets" / "packed.mat"]


def _read_mat(folder: Path, file: Path) -> bool:
    """As the product reads it, but that the process which may crash is forked, not started: a hundred times faster."""
    out, err = folder / "out.json", folder / "err.txt"
    child = os.fork()
    if child == 0:
        for target, number in ((out, 1), (err, 2)):
            os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = matlab.main(str(file))
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    layouts.read_db_struct = lambda source: matlab.from_output(  # type: ignore[attr-defined]
        source, os.waitstatus_to_exitcode(status), out.read_bytes(), err.read_bytes()
    )
    netvlad_mat("a", folder, file.stem)
    return False


def _npz(folder: Path) -> list[Path]:
    names = [f"{n}.jpg" for n in range(4)]
    _images(folder, names)
    arrays = {"utmDb": np.arange(8.0).reshape(4, 2), "utmQ": np.arange(4.0).reshape(2, 2), "posDistThr": np.array(25.0)}
    np.savez(folder / "set.npz", **arrays)
    (folder / "set_imageNames_index.txt").write_text("\n".join(names))
    (folder / "set_imageNames_query.txt").write_text("\n".join(names[:2]))
    return [folder / "set.npz", folder / "set_imageNames_index.txt", folder / "set_imageNames_query.txt"]


def _read_npz(folder: Path, file: Path) -> bool:
    patch_netvlad("a", folder, "set")
    return False


def _read_msls_benchmark(folder: Path, file: Path) -> bool:
    return bool(msls_11k("msls", folder).notes)


# Photographs.


def _photographs(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    gps = exif.get_ifd(0x8825)
    gps.update({1: "N", 2: (50.0, 1.0, 2.5), 3: "E", 4: (7.0, 1.0, 2.5)})
    for name, options in {
        "plain.jpg": {"exif": exif},
        "progressive.jpg": {"progressive": True},
        "image.png": {"exif": exif},
        "image.gif": {},
        "image.webp": {"exif": exif},
        "lossless.webp": {"lossless": True},
        "image.avif": {"exif": exif},
        "image.tif": {"exif": exif},
        "packed.tif": {"compression": "tiff_lzw"},
        "jpeg.tif": {"compression": "jpeg"},
        "image.bmp": {},
        "image.ppm": {},
    }.items():
        image.save(folder / name, **options)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").quantize(17).save(folder / "palette.png")
    grey16.save(folder / "grey16.png")
    grey16.save(folder / "grey16.tif")
    if reads_heic():
        import pillow_heif

        pillow_heif.from_pillow(image).save(folder / "image.heic")
    return sorted(folder.iterdir())


def _read_photographs(folder: Path, file: Path) -> bool:
    photo = read_photo(file, ShardOptions(max_side=16, convert=True))
    if isinstance(photo, str) and (not photo or "\n" in photo):
        raise AssertionError(photo)
    read_image(file, 14)
    return isinstance(photo, str)


# Weights, checkpoints, features, logs.


def _weights(folder: Path) -> list[Path]:
    state = facebook_layout({k: v.clone() for k, v in backbone("tiny14", "random").state_dict().items()})
    save_file(state, folder / "tiny.safetensors")
    torch.save(state, folder / "tiny.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return [folder / "tiny.safetensors", folder / "tiny.pth", folder / "old.pth"]


def _read_weights(folder: Path, file: Path) -> bool:
    build_model(TINY.model_copy(update={"weights": str(file)}))
    try:
        infer_backbone(file)
    except ValueError as error:  # of a tiny network there is no name to infer
        if "fits no backbone" not in str(error):
            raise
    return False


def _checkpoint(folder: Path) -> list[Path]:
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    model = build_model(TINY)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint / "model-00000-of-00001.safetensors"
    )
    state = {
        "step": 4,
        "skipped_steps": 0,
        "bad_images": 0,
        "recalls": {"4": 50.0},
        "mlflow_run_id": None,
        "before": [],
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    recipe = Recipe().model_copy(update={"model": TINY})
    (checkpoint / "recipe.yaml").write_text(recipe_text(recipe))
    for kind in ("optimizer", "random", "queue"):
        save_file({kind: torch.zeros(1)}, checkpoint / f"{kind}-00000-of-00001.safetensors")
    (checkpoint / "optimizer.json").write_text(json.dumps({"counts": {}, "scaler": {}}))
    _list_files(checkpoint / "state.json")
    point(folder / "checkpoints" / "latest", checkpoint)
    point(folder / "checkpoints" / "best", checkpoint, 50.0)
    names = ("latest", "best", *(f"step-00000004/{n}" for n in (MANIFEST, "state.json", "recipe.yaml")))
    return [*(folder / "checkpoints" / name for name in names), checkpoint / "model-00000-of-00001.safetensors"]


def _list_files(file: Path) -> None:
    """The manifest, so that files are read that its digests would refuse; it is mutated itself too."""
    if file.name in (MANIFEST, "latest", "best"):
        return
    checkpoint = file.parent
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)}
        for f in checkpoint.iterdir()
        if f.name != MANIFEST
    }
    text = json.dumps({"format": 3, "step": 4, "world_size": 1, "files": files})
    (checkpoint / MANIFEST).write_text(text)


def _read_checkpoint(folder: Path, file: Path) -> bool:
    checkpoints = folder / "checkpoints"
    _, notes = newest_valid(checkpoints)
    if not all(note and "\n" not in note for note in notes):
        raise AssertionError(notes)
    best_recall(checkpoints)
    step = find_checkpoint(folder)
    load_stored_recipe(step / "recipe.yaml")
    run_of(step)
    checkpoint_weights(step)
    export_network(step, folder / "out" / "network.safetensors")
    return bool(notes)


def _features(folder: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(int(n), 4, generator=generator) for n in (3, 0, 5, 2)]
    store(folder / "features", images)
    open_folder(folder / "features", {"key": "test", "images": 4})
    return sorted((folder / "features").iterdir())


def _read_features(folder: Path, file: Path) -> bool:
    open_folder(folder / "features", {"key": "test", "images": 4})
    bounds = [(0, 3), (3, 4)]
    for number, (first, stop) in enumerate(bounds):
        shard_is_whole(folder / "features" / f"features-{number:06d}.safetensors", "test", stop - first)
    features = StoredFeatures(folder / "features", bounds)
    features.descriptors().sum()
    _ = features.max_patches, features.bytes_per_image, features.local_bytes_per_image
    features.patches(np.arange(4), torch.device("cpu"))
    return False


def _logs(folder: Path) -> list[Path]:
    start = {"event": "start", "time_ms": 1, "training": "t", "run_id": None, "name": "n", "experiment": "e"}
    lines = [
        {**start, "params": {"a": "1"}, "facts": {"git.commit": "x"}},
        *({"step": n, "time_ms": n, "train/loss": 0.5} for n in range(5)),
        {"event": "artifact", "time_ms": 6, "path": "recipe.yaml", "folder": None},
        {"event": "evaluation", "time_ms": 7, "name": "town", "step": 4, "params": {}, "metrics": {"recall_1": 50.0}},
        {"event": "end", "time_ms": 9, "status": "FINISHED"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.sent").write_text(json.dumps({"uri": "x", "run_id": "r", "offset": 10}) + "\n")
    return [folder / "metrics.jsonl", folder / "metrics.sent"]


def _read_logs(folder: Path, file: Path) -> bool:
    damaged = sum(record is None for _, _, record in read_records(folder / "metrics.jsonl"))
    read_state(folder)
    return bool(damaged)


READERS: dict[str, Reader] = {
    "recipe": Reader(_recipe, _read_recipe),
    "index": Reader(_shard_set, _read_index, _without_digest),
    "index values": Reader(_index_values, _read_index, _index_from_json, lambda _: [INDEX]),
    "tars": Reader(_make_tars, _read_tars),
    "unfinished tars": Reader(_rows, _read_rows),
    "GSV-Cities": Reader(_gsv, _read_gsv),
    "MSLS, training": Reader(lambda f: _msls_folder(f, ("a",)), _read_msls_source),
    "table of places": Reader(
        _source_table,
        _table_by(lambda file: read_manifest(file, min_images_per_place=1)),
        _values_to_parquet,
        lambda _: ["table.csv", "table.parquet"],
    ),
    "table of a benchmark": Reader(
        _benchmark_table, _table_by(lambda file: manifest("m", file)), _values_to_parquet, lambda _: ["table."]
    ),
    "ground truth .npy": Reader(_ground_truth, _read_ground_truth),
    "ground truth .mat": Reader(_mat, _read_mat, share=0.05),
    "ground truth .npz": Reader(_npz, _read_npz),
    "MSLS, evaluation": Reader(lambda f: _msls_folder(f, ("cph", "sf")), _read_msls_benchmark),
    "photographs": Reader(_photographs, _read_photographs),
    "weights": Reader(_weights, _read_weights),
    "checkpoint": Reader(
        _checkpoint, _read_checkpoint, _list_files, lambda f: [f.name, "step-00000004", "checkpoints"]
    ),
    "features": Reader(_features, _read_features),
    "metrics": Reader(_logs, _read_logs),
}
