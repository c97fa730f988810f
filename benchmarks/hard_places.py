"""What hard places cost: `python -m benchmarks.hard_places [--json FILE]`.

Ten epochs of tiny14 on the town at two ranks, a quarter of the steps hard: seconds of encoding and composing as a share
of each epoch's (SAGE reports 17.7 %). Then composing alone, of random unit descriptors, each size in a process of its
own: seconds and peak memory, against a bare FAISS search for the neighbours of every row, timed on some queries.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import tyro
import yaml

from benchmarks.peak_memory import Peak
from benchmarks.report import figures_of, print_table, write_json
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.town.render import Town, render_town
from trainer.cliques import Wanted, alike_batches

ROOT = Path(__file__).resolve().parent.parent
IVF_FROM = 200_000  # rows from which the peer searches an IVF index, as exact search of all would take hours


@dataclass(frozen=True)
class Options:
    """Measures hard places: the share of an epoch that choosing them takes, then composing alone.

    With --epochs 0 composing alone.
    """

    ranks: int = 2
    """Ranks of the training."""
    epochs: int = 10
    """Epochs of the training; 0 leaves it out."""
    places: int = 180
    """Places of the town, of 8 views each."""
    share: float = 0.25
    """data.hard_share of the training."""
    backbone: str = "tiny14"
    """Backbone, random weights."""
    side: int = 112
    """Side in pixels of its images."""
    rows: tuple[int, ...] = (10**4, 10**5, 10**6)
    """Numbers of descriptors that are composed alone."""
    numbers: int = 512
    """Numbers of each of these."""
    batch: int = 64
    """Places of a batch of theirs; half of the rows come into one."""
    queries: int = 1_000
    """Rows whose neighbours the peer is timed on; its time is scaled to all rows."""
    json: Path | None = None
    """File for the figures."""
    worker: int = 0
    """Used by the script for the processes that it starts: rows to compose."""


def training(options: Options) -> dict[str, float]:
    """Runs the training by the launcher; seconds of steps, encoding and composing, by epoch and in all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        render_town(folder / "town", Town(places=options.places, held_out_places=0))
        write_shards(read_gsv_cities(folder / "town" / "train"), folder / "shards")
        recipe = {
            "name": "hard",
            "output": str(folder / "run"),
            "data": {
                **{"shards": str(folder / "shards"), "composition": "mixed", "image_size": options.side},
                **{"places_per_batch": 8, "images_per_place": 4, "hard_share": options.share, "decode_threads": 1},
            },
            "model": {"backbone": options.backbone, "weights": "random", "finetune_last_n_blocks": 4},
            "memory": {"size": 512, "start_epoch": 1},
            "trainer": {"epochs": options.epochs, "validate_every_epochs": 0, "log_every_steps": 1},
            "tracking": {"enabled": False},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        launched = ("launch", "--nproc-per-node", str(options.ranks), "--", "train", str(folder / "recipe.yaml"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "rerankvpr", *launched],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"the training failed:\n{(done.stdout + done.stderr)[-2000:]}")
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in lines:
        for key in ("step_s", "hard_encode_s", "hard_compose_s", "hard_steps"):
            seconds[int(line.get("train/epoch", 0))][key] += line.get(f"train/{key}", 0.0)
    rows: list[list[str]] = []
    shares: list[float] = []
    figures: dict[str, float] = {}
    for epoch, of in sorted(seconds.items()):
        cost = of["hard_encode_s"] + of["hard_compose_s"]
        shares.append(100 * cost / (of["step_s"] + cost))
        figures |= {f"epoch_{epoch}_{key}": value for key, value in of.items()}
        times = (of["step_s"], of["hard_encode_s"], of["hard_compose_s"])
        rows.append(
            [str(epoch), f"{of['hard_steps']:.0f}", *(f"{value:.3f}" for value in times), f"{shares[-1]:.1f} %"]
        )
    total = {key: sum(of[key] for of in seconds.values()) for key in ("step_s", "hard_encode_s", "hard_compose_s")}
    cost = total["hard_encode_s"] + total["hard_compose_s"]
    figures |= {**total, "share_percent": 100 * cost / (total["step_s"] + cost)}
    figures |= {"share_percent_median": statistics.median(shares)}
    rows.append(["all", "", *(f"{value:.3f}" for value in total.values()), f"{figures['share_percent']:.1f} %"])
    print_table(
        f"{options.epochs} epochs of {options.backbone} at {options.ranks} ranks, {options.places} places, share "
        f"{options.share:g}",
        ["epoch", "hard steps", "steps, s", "encoding, s", "composing, s", "of the epoch"],
        rows,
    )
    return figures


def unit_rows(number: int, size: int) -> np.ndarray:
    """Random unit descriptors, float16."""
    rng, rows_ND = np.random.default_rng(0), np.empty((number, size), dtype=np.float16)
    for start in range(0, number, 2**12):
        block = rng.standard_normal((min(2**12, number - start), size), dtype=np.float32)
        rows_ND[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return rows_ND


def composing(options: Options) -> None:
    """Composes `options.worker` rows and searches for their neighbours; prints the figures."""
    rows_ND = unit_rows(options.worker, options.numbers)
    wanted = Wanted(options.worker // (2 * options.batch), options.batch)
    memory, began = Peak(), time.perf_counter()
    alike = alike_batches(rows_ND, wanted, np.random.Philox(0))
    seconds, peak = time.perf_counter() - began, memory.mb()
    k, queries = 4 * options.batch + 16, min(options.queries, options.worker)
    floats_ND = rows_ND.astype(np.float32)
    began = time.perf_counter()
    index: faiss.Index = faiss.IndexFlatIP(options.numbers)
    if options.worker >= IVF_FROM:
        cells = int(4 * options.worker**0.5)
        index = faiss.IndexIVFFlat(index, options.numbers, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid, index.nprobe = 64, 8
        index.train(floats_ND)
    index.add(floats_ND)
    built = time.perf_counter() - began
    began = time.perf_counter()
    index.search(floats_ND[:queries], k)
    peer = built + (time.perf_counter() - began) * options.worker / queries
    figures = {
        "batches": float(len(alike.batches_HP)),
        "wanted": float(wanted.batches),
        "similarity": alike.similarity,
        "pool_similarity": alike.pool_similarity,
        "seconds": seconds,
        "peak_mb": peak,
        "descriptors_mb": rows_ND.nbytes / 2**20,
        "faiss_s": peer,
        "of_faiss": seconds / peer,
    }
    print(json.dumps(figures))


def main(options: Options) -> dict[str, float]:
    """Runs both parts, prints their tables and returns the figures."""
    figures = training(options) if options.epochs else {}
    rows = []
    for number in options.rows:
        arguments = ("--worker", number, "--numbers", options.numbers, "--batch", options.batch)
        command = [sys.executable, "-m", "benchmarks.hard_places", *arguments, "--queries", options.queries]
        of = figures_of([str(word) for word in command], f"composing {number} rows")
        figures |= {f"rows_{number}_{key}": value for key, value in of.items()}
        peer = f"{of['faiss_s']:,.1f} ({'IVF' if number >= IVF_FROM else 'exact'})"
        made = f"{of['batches']:,.0f} of {of['wanted']:,.0f}"
        sizes = (f"{of['descriptors_mb']:,.0f}", f"{of['peak_mb']:,.0f}")
        rows.append([f"{number:,}", made, f"{of['seconds']:,.2f}", *sizes, peer, f"{of['of_faiss']:.2f}"])
    if rows:
        print_table(
            f"composing alone, random unit descriptors of {options.numbers} numbers, batches of {options.batch}",
            ["rows", "batches", "s", "held, MB", "more at its peak, MB", "FAISS, all rows, s", "of FAISS"],
            rows,
        )
    write_json(options.json, figures)
    return figures


if __name__ == "__main__":
    parsed = tyro.cli(Options)
    if parsed.worker:
        composing(parsed)
    else:
        main(parsed)
