"""A data set as large as GSV-Cities, of synthetic photographs: written, sharded, checked, planned and trained on.

`python -m benchmarks.full_size [--scale 0.01] [--json FILE]`

62,000 places in 23 cities with 530,000 JPEGs of 2 to 5 kB in GSV-Cities' layout; a few thousand pictures of noise, each
JPEG with a comment of its own, so that no two are equal. It is sharded by one process, by two, and as 16 parts of
an array (two at a time) and the run that joins them: all three must give one set. Then verify, inspect with the plan of
an epoch, plan, and a training of tiny14 by two ranks that ends in a checkpoint and resumes with four. Peak memory is
the kernel's (VmHWM) of every process of a command. `--scale` takes a part of the places; temporary files, about 6 GB of
the whole, go at the end.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

import numpy as np
import psutil
import tyro
import yaml
from PIL import Image

from benchmarks.peak_memory import status_mb
from benchmarks.report import print_table, write_json
from data_pipeline.index import read_index
from data_pipeline.sources.gsv_cities import COLUMNS
from trainer.checkpoint_folder import newest_valid, step_name

PLACES, IMAGES, CITIES, PICTURES, PARTS = 62_000, 530_000, 23, 4_000, 16
_SAMPLED_S = 0.05


@dataclass(frozen=True)
class Options:
    """Measures every step from photographs to a resumed training at the size of GSV-Cities."""

    scale: float = 1.0
    """Share of the places; 0.01 takes about two minutes."""
    steps: int = 300
    """Steps of the training at two ranks, and again as many at four."""
    folder: Path | None = None
    """Where temporary files go, about 6 GB of the whole; the system's own folder without it."""
    json: Path | None = None
    """File for the figures."""


@dataclass
class Run:
    """What a command took: seconds, and the peak memory of each of its processes in MB, the largest first."""

    seconds: float = 0.0
    peaks_mb: list[float] = field(default_factory=list)


def jpegs(rng: np.random.Generator, count: int) -> list[bytes]:
    """Small photographs of coarse noise with edges, 2 to 5 kB each."""
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        fine = rng.normal(0, 9, (72, 96, 1))
        pixels = np.asarray(coarse.resize((96, 72), Image.Resampling.BILINEAR), dtype=np.float64) + fine
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=80)
        pictures.append(data.getvalue())
    return pictures


def write_source(folder: Path, places: int, images: int) -> int:
    """GSV-Cities' layout of so many places and images; the bytes of all photographs."""
    rng = np.random.default_rng(0)
    pictures = jpegs(rng, max(1, min(PICTURES, images)))
    views = np.full(places, images // places)
    views[: images % places] += 1
    total, number = 0, 0
    (folder / "Dataframes").mkdir(parents=True)
    for city, of_city in enumerate(np.array_split(np.arange(places), min(CITIES, places))):
        name = f"Synthetic{city:02d}"
        images_of_city = folder / "Images" / name
        images_of_city.mkdir(parents=True)
        with (folder / "Dataframes" / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for at, place in enumerate(of_city.tolist()):
                lat, lon = f"{40 + city + at // 100 * 0.0005:.6f}", f"{10 + at % 100 * 0.0005:.6f}"
                for view in range(int(views[place])):
                    year, month, north, pano = 2008 + view, 1 + view % 12, (37 * view) % 360, f"synthetic{number:08d}"
                    table.writerow((at, year, month, north, name, lat, lon, pano))
                    base, comment = pictures[number % len(pictures)], pano.encode()
                    data = base[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + base[2:]
                    file_name = f"{name}_{at:07d}_{year:04d}_{month:02d}_{north:03d}_{lat}_{lon}_{pano}.jpg"
                    (images_of_city / file_name).write_bytes(data)
                    total += len(data)
                    number += 1
    return total


@contextmanager
def watched(process: psutil.Process) -> Iterator[list[float]]:
    """Peaks of a process and all below it, in MB; complete once the block has ended."""
    peaks: dict[tuple[int, float], float] = {}
    gone = threading.Event()
    result: list[float] = []

    def look() -> None:
        while not gone.is_set():
            try:
                family = [process, *process.children(recursive=True)]
            except psutil.Error:
                return
            for one in family:
                try:
                    peaks[one.pid, one.create_time()] = status_mb("VmHWM", one.pid)
                except (OSError, StopIteration, psutil.Error):
                    continue
            gone.wait(_SAMPLED_S)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        gone.set()
        watcher.join()
        result += sorted(peaks.values(), reverse=True)


def run(*words: str, log: Path) -> Run:
    """Runs `rerankvpr ...` to its end, which must be a good one."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "rerankvpr", *words], stdout=printed, stderr=subprocess.STDOUT, env=environment
        )
        with watched(psutil.Process(process.pid)) as peaks:
            status = process.wait()
    if status:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"rerankvpr {' '.join(words)} ended with status {status}")
    return Run(time.perf_counter() - began, peaks)


def in_parts(source: Path, out: Path, flags: Sequence[str], log: Path) -> Run:
    """As tasks of an array, two at a time, and the run that joins them."""
    began = time.perf_counter()

    def part(number: int) -> Run:
        return run("shard", "gsv-cities", str(source), str(out), "--part", f"{number}/{PARTS}", *flags, log=log)

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(part, range(PARTS)))
    runs.append(run("shard", "gsv-cities", str(source), str(out), *flags, log=log))
    peaks = sorted((peak for one in runs for peak in one.peaks_mb), reverse=True)
    return Run(time.perf_counter() - began, peaks)


def write_recipe(folder: Path, shards: Path, places: int, steps: int) -> Path:
    """A training of tiny14 that saves at its end alone."""
    recipe = {
        "name": "full_size",
        "output": str(folder / "run"),
        "data": {
            "shards": str(shards),
            "places_per_batch": 64 if places >= 6_400 else 16,
            "images_per_place": 4,
            "image_size": 56,
            "composition": "mixed",
            "decode_threads": 1,
        },
        "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem"},
        "memory": {"size": 4096 if places >= 6_400 else 256, "start_epoch": 0},
        "trainer": {"epochs": 1_000, "max_steps": steps, "validate_every_epochs": 0, "checkpoint_every_steps": steps},
        "tracking": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(options: Options) -> dict[str, float]:
    """Runs everything, prints the table and returns the figures."""
    places = max(CITIES * 4, round(PLACES * options.scale))
    images = max(places * 4, round(IMAGES * options.scale))
    runs: dict[str, Run] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=options.folder) as name:
        work = Path(name)
        source, log = work / "source", work / "log.txt"
        began = time.perf_counter()
        sizes["source written"] = write_source(source, places, images)
        runs["source written"] = Run(time.perf_counter() - began)
        flags = ["--shard-mb", "64" if options.scale >= 0.5 else "1"]
        digests = set()
        for kind in ("shard, 1 worker", "shard, 2 workers", f"shard, {PARTS} parts"):
            rmtree(work / "set", ignore_errors=True)
            if kind.endswith("parts"):
                runs[kind] = in_parts(source, work / "set", [*flags, "--threads", "1"], log)
            else:
                workers = kind.split()[1]
                words = ["shard", "gsv-cities", str(source), str(work / "set"), *flags, "--workers", workers]
                runs[kind] = run(*words, log=log)
            sizes[kind] = folder_bytes(work / "set")
            index = read_index(work / "set")
            if (index.num_places, index.num_images) != (places, images):
                raise SystemExit(
                    f"{kind}: {index.num_places} places, {index.num_images} images; {places}, {images} are there"
                )
            digests.add(index.digest)
            print(f"{kind}: {runs[kind].seconds:.1f} s", flush=True)
        if len(digests) != 1:
            raise SystemExit(f"one, two workers and parts gave {len(digests)} different sets")
        tars = len(index.metadata.shards)
        runs["again, complete"] = run("shard", "gsv-cities", str(source), str(work / "set"), *flags, log=log)
        runs["verify"] = run("verify", str(work / "set"), log=log)
        runs["inspect, plan of an epoch"] = run(
            "inspect", str(work / "set"), "--plan", str(work / "plan.parquet"), "--places-per-batch", "16", log=log
        )
        recipe = str(write_recipe(work, work / "set", places, options.steps))
        runs["plan"] = run("plan", recipe, "--ranks", "2", log=log)
        for ranks, upto in ((2, options.steps), (4, 2 * options.steps)):
            kind = f"train to step {upto}, {ranks} ranks"
            words = ["launch", "--nproc-per-node", str(ranks), "--", "train", recipe, "--trainer.max-steps", str(upto)]
            words += ["--resume"] if upto > options.steps else []
            runs[kind] = run(*words, log=log)
            found, _ = newest_valid(work / "run" / "checkpoints")
            if found is None or found.name != step_name(upto):
                raise SystemExit(
                    f"{kind}: the newest checkpoint is {found}, not of step {upto}\n{log.read_text()[-2000:]}"
                )
            print(f"{kind}: {runs[kind].seconds:.1f} s", flush=True)
        sizes["run"] = folder_bytes(work / "run")
        if "resumed from" not in log.read_text():
            raise SystemExit(f"the second training did not resume\n{log.read_text()[-2000:]}")

    figures: dict[str, float] = {"places": places, "images": images, "tars": tars}
    rows = []
    for kind, one in runs.items():
        key = kind.replace(",", "").replace(" ", "_")
        figures[f"{key}_s"] = one.seconds
        figures |= {f"{key}_peak_{number}_mb": peak for number, peak in enumerate(one.peaks_mb)}
        if kind in sizes:
            figures[f"{key}_mb"] = sizes[kind] / 2**20
        of_all = one.seconds > 0 and (kind.startswith(("shard", "source", "verify")))
        rows.append(
            [
                kind,
                f"{one.seconds:,.1f}",
                f"{images / one.seconds:,.0f}" if of_all else "",
                _peaks(one.peaks_mb),
                f"{sizes[kind] / 2**20:,.0f}" if kind in sizes else "",
            ]
        )
    print_table(
        f"{places:,} places, {images:,} synthetic photographs, {tars} tars",
        ["", "seconds", "images/s", "peak MB of its processes", "MB written"],
        rows,
    )
    write_json(options.json, figures)
    return figures


def _peaks(peaks_mb: Sequence[float]) -> str:
    """The peaks of a command's processes; of many, the largest and the number of the others."""
    shown = " + ".join(f"{peak:,.0f}" for peak in peaks_mb[:6])
    return f"{shown} + {len(peaks_mb) - 6} more" if len(peaks_mb) > 6 else shown


if __name__ == "__main__":
    main(tyro.cli(Options))
