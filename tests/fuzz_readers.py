"""Everything of ours that reads a file, each with valid files to mutate; see tests/fuzzing.py."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from configs.files import file_sha256
from configs.load import load_recipe, load_stored_recipe, recipe_text
from configs.schema import Recipe
from data_pipeline.formats import reads_heic
from data_pipeline.images import read_image
from data_pipeline.photos import read_photo
from data_pipeline.shard_options import ShardOptions
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
from tests import fuzz_answers, fuzz_places
from tests.fuzz_places import msls_folder, table, table_by, values_to_parquet
from tests.fuzzing import LIMIT_BYTES, Reader
from tests.networks import speck
from tests.photos import jpeg
from tests.stored import store
from trainer.checkpoint import checkpoint_weights
from trainer.checkpoint_folder import MANIFEST, best_recall, find_checkpoint, newest_valid, point
from trainer.export import export_network
from trainer.metrics_log import read_records
from trainer.mlflow_sender import read_state, run_of

# Recipes.


def _recipe(folder: Path) -> list[Path]:
    (folder / "recipe.yaml").write_text(recipe_text(Recipe()))
    (folder / "short.yaml").write_text("name: a\ndata: {shards: x, mix: {y: 0.5}}\noptim:\n  milestones: [1, 2]\n")
    return [folder / "recipe.yaml", folder / "short.yaml"]


def _read_recipe(folder: Path, file: Path) -> bool:
    load_recipe(file)
    return False


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
    return table(folder, rows)


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
    """As the product reads it, but that the process which may crash is a fork: a hundred times faster."""
    out, err = folder / "out.json", folder / "err.txt"
    if not file.is_file():
        matlab.read_db_struct(file)  # refuses it
    server = _mat_server()
    assert server.stdin
    assert server.stdout
    server.stdin.write(f"{json.dumps([str(path) for path in (file, out, err)])}\n")
    status = int(server.stdout.readline())
    layouts.read_db_struct = lambda source: matlab.from_output(  # type: ignore[attr-defined]
        source, status, out.read_bytes(), err.read_bytes()
    )
    netvlad_mat("a", folder, file.stem)
    return False


MAT_SERVER = """
import json, os, resource, runpy, sys
import scipy.io
main = runpy.run_path(sys.argv[1])["main"]
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
for line in sys.stdin:
    source, *targets = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, target in enumerate(targets, 1):
            os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = main(source)
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _mat_server() -> subprocess.Popen[str]:
    """A small process that forks a reader for each line of its stdin: a fork of this one would copy far more."""
    command = [sys.executable, "-c", MAT_SERVER, str(Path(matlab.__file__).resolve()), str(LIMIT_BYTES)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


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
    state = facebook_layout(dict(build_model(speck()).backbone.state_dict()))
    save_file(state, folder / "new.safetensors")
    torch.save(state, folder / "new.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return [folder / "new.safetensors", folder / "new.pth", folder / "old.pth"]


def _read_weights(folder: Path, file: Path) -> bool:
    build_model(speck().model_copy(update={"weights": str(file)}))
    infer_backbone(file)
    return False


def _checkpoint(folder: Path) -> list[Path]:
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    config = speck()
    weights = {k: v.contiguous() for k, v in build_model(config).state_dict().items()}
    save_file(weights, checkpoint / "model-00000-of-00001.safetensors")
    state = {
        "step": 4,
        "skipped_steps": 0,
        "bad_images": 0,
        "recalls": {"4": 50.0},
        "mlflow_run_id": None,
        "before": [],
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    recipe = {"name": "a", "seed": 3, "model": config.model_dump(), "memory": {"size": 30}}  # all of one: "recipe"
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(recipe))
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
    **fuzz_places.READERS,
    "table of a benchmark": Reader(
        _benchmark_table, table_by(lambda file: manifest("m", file)), values_to_parquet, lambda _: ["table."]
    ),
    "ground truth .npy": Reader(_ground_truth, _read_ground_truth),
    "ground truth .mat": Reader(_mat, _read_mat),
    "ground truth .npz": Reader(_npz, _read_npz),
    "MSLS, evaluation": Reader(lambda f: msls_folder(f, ("cph", "sf")), _read_msls_benchmark),
    "photographs": Reader(_photographs, _read_photographs),
    "weights": Reader(_weights, _read_weights),
    "checkpoint": Reader(
        _checkpoint, _read_checkpoint, _list_files, lambda f: [f.name, "step-00000004", "checkpoints"]
    ),
    "features": Reader(_features, _read_features),
    "metrics": Reader(_logs, _read_logs),
    **fuzz_answers.READERS,
}
