"""Images a second of the loader and of its peers, on the same photographs and with the same number of threads.

`python -m benchmarks.loader [--source FOLDER] [--streaming-python PYTHON] [--json FILE]`
`python -m benchmarks.loader --stores local http s3` (see `benchmarks.loader_stores`)

(a) bare: torchvision's decode and resize of bytes in memory; (b) this loader, from tars to uint8 batches (RandAugment
and normalisation are the model's device's; a row has them on the CPU, in the thread that trains); (c) torch's
DataLoader over single files with pandas, PIL, RandAugment and normalisation, as the field trains; (d) webdataset's own
pipeline on the same tars; (e) MosaicML Streaming, in the environment of `--streaming-python` (`pip install
mosaicml-streaming torch torchvision`; it pins older versions than this project). Rounds alternate, medians count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader, Dataset

from benchmarks.batches import endless, plans_and_loader
from benchmarks.loader_peers import Batch, bare, images_per_second, pandas_pil, webdataset
from benchmarks.loader_stores import measure_stores
from benchmarks.report import print_table, write_json
from configs.schema import DataConfig
from data_pipeline.augment import image_seeds, randaugment
from data_pipeline.images import normalise
from data_pipeline.index import ShardIndex
from data_pipeline.mixture import EpochPlans, read_mixture
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town

ROOT = Path(__file__).resolve().parent.parent
_CLOSE = 3  # times in a round that the loader is measured right after bare decoding, the closest of its rivals


@dataclass(frozen=True)
class Options:
    """Measures loaders against each other."""

    source: Path | None = None
    """Folder in GSV-Cities' layout; without it a town is rendered, 180 places x 8 views."""
    batch: Annotated[Batch, tyro.conf.arg(name="")] = field(default_factory=Batch)
    threads: int = 2
    """Decoding threads, or worker processes, of each loader."""
    images: int = 4000
    """Images of a round."""
    rounds: int = 3
    """Rounds of each loader."""
    epochs: int = 10
    """Epochs over which the resident memory is watched."""
    streaming_python: Path | None = None
    """Python of an environment with mosaicml-streaming, torch and torchvision; without it (e) is left out."""
    stores: tuple[Literal["local", "http", "s3"], ...] = ()
    """Measures both ways to the tars (data.access) on these stores instead of the peers."""
    json: Path | None = None
    """File for the figures."""


class _Steps(Dataset[torch.Tensor]):
    """The steps of one epoch as items, each decoded by the process that fetches it."""

    def __init__(self, data: DataConfig) -> None:
        plans, self.loader = plans_and_loader(data.model_copy(update={"decode_threads": 0}))
        self.plan = plans.epoch(0)

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, step: int) -> torch.Tensor:
        return next(self.loader.batches(self.plan, [step])).images_B3HW


def by_processes(data: DataConfig) -> Iterator[torch.Tensor]:
    """The same batches, a step a worker process of torch's DataLoader at a time, handed over in shared memory."""
    loader = DataLoader(_Steps(data), batch_size=None, num_workers=data.decode_threads, persistent_workers=True)
    while True:
        yield from loader


def _augmented(data: DataConfig) -> Iterator[torch.Tensor]:
    """This loader's batches with all that the field's loader does: RandAugment, floats, normalisation; on the CPU."""
    for number, batch in enumerate(endless(*plans_and_loader(data))):
        seeds = image_seeds(0, number, batch.place_ids_B, batch.views_B)
        yield normalise(randaugment(batch.images_B3HW, seeds, num_ops=3, magnitude=9))


def seconds_to_first_batch(data: DataConfig, *, into_epoch: float, world_size: int = 1) -> float:
    """From nothing but the path to the last rank's first batch of a run that starts at this part of an epoch."""
    began = time.perf_counter()
    plans, loader = plans_and_loader(data, rank=world_size - 1, world_size=world_size)
    next(loader.batches(plans.epoch(3), range(int(into_epoch * plans.num_steps), plans.num_steps)))
    return time.perf_counter() - began


def resident_growth_mb(data: DataConfig, epochs: int) -> float:
    """Growth of the resident memory over the second half of the epochs, each of which sees large cities ten times."""
    places = read_mixture(data)
    large = [places.cities[city] for city in np.flatnonzero(np.bincount(places.place_city) >= data.places_per_batch)]
    data = data.model_copy(update={"composition": "city", "repeat": dict.fromkeys(large, 10)})
    plans, loader = plans_and_loader(data)
    resident = []
    for epoch in range(epochs):
        for _ in loader.batches(plans.epoch(epoch), range(plans.num_steps)):
            pass
        resident.append(_resident_mb())
    return resident[-1] - resident[len(resident) // 2]


def main(options: Options) -> dict[str, float]:
    """Runs all loaders, prints their rates, and returns the figures."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = options.source
        if source is None:
            render_town(work / "town", Town(held_out_places=0))
            source = work / "town" / "train"
        write_shards(read_gsv_cities(source), work / "set", ShardOptions(shard_bytes=8 * 2**20))
        batch, data = options.batch, _config(options, work / "set")
        if options.stores:
            counts = {"images": options.images, "rounds": options.rounds}
            figures = measure_stores(options.stores, work / "set", data, **counts)
            write_json(options.json, figures)
            return figures
        jpegs = _planned_jpegs(data, options.images)
        rates: dict[str, list[float]] = {}

        def measure(name: str, rate: float) -> None:
            rates.setdefault(name, []).append(rate)
            print(f"  {name}: {rate:.0f} images/s", flush=True)

        for _ in range(options.rounds):
            for _ in range(_CLOSE):
                measure("bare", bare(jpegs, batch.side, options.threads))
                measure("loader", images_per_second(endless(*plans_and_loader(data)), options.images, batch.images))
            measure("processes", images_per_second(by_processes(data), options.images, batch.images))
            measure("augmented", images_per_second(_augmented(data), options.images, batch.images))
            measure("pil", images_per_second(pandas_pil(source, batch, options.threads), options.images, batch.images))
            measure(
                "webdataset",
                images_per_second(webdataset(work / "set", batch, options.threads), options.images, batch.images),
            )
            if options.streaming_python:
                measure("streaming", _streaming(options, source, work / "mds"))
        first_batch_s = seconds_to_first_batch(data, into_epoch=0)
        resume_s = max(
            seconds_to_first_batch(data, into_epoch=part, world_size=world_size)
            for part in (0.1, 0.5, 0.9)
            for world_size in (1, 2, batch.places)
            if batch.places % world_size == 0
        )
        growth_mb = resident_growth_mb(data, options.epochs)

    rate = {name: median(values) for name, values in rates.items()}
    figures = {f"{name}_images_per_s": value for name, value in rate.items()}
    ratios = [b / a for a, b in zip(rates["bare"], rates["loader"], strict=True)]
    figures |= {"threads": float(options.threads), "of_bare": median(ratios)}
    figures |= {"of_bare_least": min(ratios), "of_bare_most": max(ratios)}
    figures["threads_over_processes"] = rate["loader"] / rate["processes"]
    for peer in ("pil", "webdataset", "streaming"):
        if peer in rate:
            figures[f"over_{peer}"] = rate["loader"] / rate[peer]
    figures["augmented_over_pil"] = rate["augmented"] / rate["pil"]
    figures |= {"first_batch_s": first_batch_s, "resume_s": resume_s, "resident_growth_mb": growth_mb}
    labels = {
        "bare": "(a) bare torchvision decode + resize, in memory",
        "loader": "(b) this loader",
        "processes": "(b) decoding in processes, not threads",
        "augmented": "(b) and RandAugment, normalisation on the CPU",
        "pil": "(c) DataLoader: files, pandas, PIL, RandAugment",
        "webdataset": "(d) webdataset's pipeline, same tars",
        "streaming": "(e) MosaicML Streaming",
    }
    rows = [
        [
            labels[name],
            f"{value:,.0f}",
            f"{min(rates[name]):,.0f} - {max(rates[name]):,.0f}",
            f"{rate['loader'] / value:.2f}",
        ]
        for name, value in rate.items()
    ]
    print_table(
        f"loaders, {options.threads} threads, to {batch.side} px", ["", "images/s", "range", "this loader / it"], rows
    )
    print(
        f"of bare, pair by pair: {min(ratios):.2f} - {max(ratios):.2f}; first batch after {first_batch_s:.2f} s, of a "
        f"run that resumes (3 positions, 3 world sizes) after {resume_s:.2f} s at most; memory {growth_mb:+.1f} MB "
        f"over the last half of {options.epochs} epochs"
    )
    write_json(options.json, figures)
    return figures


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _config(options: Options, shards: Path) -> DataConfig:
    return DataConfig(
        shards=str(shards),
        places_per_batch=options.batch.places,
        images_per_place=options.batch.views,
        composition="mixed",
        image_size=options.batch.side,
        decode_threads=options.threads,
    )


def _planned_jpegs(data: DataConfig, images: int) -> list[bytes]:
    """The bytes of the images that the loader is asked for, in its order."""
    places = read_mixture(data)
    plans = EpochPlans(places, data, seed=0)
    (index,) = places.sets
    jpegs: list[bytes] = []
    epoch = 0
    while len(jpegs) < images:
        plan = plans.epoch(epoch)
        for place, views in zip(plan.places_SP.ravel(), plan.views_SPK.reshape(-1, data.images_per_place), strict=True):
            jpegs += _jpegs_of(index, int(place), views.tolist())
        epoch += 1
    return jpegs[:images]


def _jpegs_of(index: ShardIndex, place: int, views: list[int]) -> list[bytes]:
    where = index.place_range(place)
    with Path(where.location).open("rb") as tar:
        tar.seek(where.start)
        data = tar.read(where.length)
    return [data[where.offsets[view] : where.offsets[view] + where.sizes[view]] for view in views]


def _streaming(options: Options, source: Path, mds: Path) -> float:
    command = [options.streaming_python, "-m", "benchmarks.loader_peers", source, mds]
    batch = options.batch
    sizes = {"side": batch.side, "batch": batch.images, "threads": options.threads, "images": options.images}
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"MosaicML Streaming failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split("images/s")[-1])


if __name__ == "__main__":
    main(tyro.cli(Options))
