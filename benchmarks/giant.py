"""Peak memory of real trainings of three steps on images of noise, beside what `rerankvpr plan` says of them.

On CPUs measured is the greatest RssAnon of a rank's process (anonymous memory: what is mapped from files, such as
libraries, is not in it), read every 20 ms from its start to its end. On GPUs it is the most that tensors took there, as
torch counts it, beside the plan without what it says of the process and of gaps between tensors.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro
import yaml
from PIL import Image

from benchmarks.peak_memory import status_mb
from benchmarks.report import print_table, write_json
from configs.load import load_recipe
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from trainer.memory_parts import FRAGMENTED
from trainer.memory_plan import GPU_PROCESS
from trainer.plan import Assumed, plan

POLL_S = 0.02
STEPS = 3
ON_GPU = torch.cuda.is_available()

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "vitg14, ZeRO 3, offload all": {
        "data": {"places_per_batch": 4, "images_per_place": 2, "image_size": 112},
        "model": {"backbone": "vitg14", "finetune_last_n_blocks": 2},
        "engine": {"zero_stage": 3, "offload": "all"},
    },
}
for stage in (1, 3):
    for checkpointing in (False, True):
        name = f"vitb14, ZeRO {stage}" + (", activation checkpointing" if checkpointing else "")
        CASES[name] = {
            "data": {"places_per_batch": 4, "images_per_place": 4, "image_size": 224},
            "model": {"backbone": "vitb14", "finetune_last_n_blocks": 6},
            "engine": {"zero_stage": stage, "activation_checkpointing": checkpointing},
        }
# Only where it is named: to see that all parts work.
SMALL_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny14": {
        "data": {"places_per_batch": 2, "images_per_place": 2, "image_size": 42},
        "model": {"backbone": "tiny14"},
        "engine": {},
    }
}
# As in the table of docs/cluster.md: 30 places x 4 images of 224 px a GPU.
GPU_CASES: dict[str, dict[str, dict[str, Any]]] = {
    f"{backbone}, all blocks{''.join(f', {key}' for key in engine)}": {
        "data": {"places_per_batch": 30, "images_per_place": 4, "image_size": 224},
        "model": {"backbone": backbone, "finetune": "all"},
        "engine": {"precision": "bf16", **engine},
    }
    for backbone, engine in (
        *(("vits14", {}), ("vitb14", {}), ("vitl14", {}), ("vitb14", {"activation_checkpointing": True})),
        *(("vitb14", {"encode_chunks": 3}), ("vitg14", {"activation_checkpointing": True})),
    )
}


@dataclass(frozen=True)
class Options:
    """Trains three steps of each case and holds the greatest memory of a rank against the planned run's."""

    ranks: int = min(2, torch.cuda.device_count()) or 2
    """Ranks, all on this machine."""
    cases: list[str] = field(default_factory=lambda: list(GPU_CASES if ON_GPU else CASES))
    """Cases to run, or the beginnings of their names."""
    seconds: float = math.inf
    """No case starts after this many seconds."""
    measured: Path | None = None
    """File of an earlier run, whose measured figures are held against the planned run's instead of training again."""
    json: Path | None = None
    """File for the figures."""


def write_noise(folder: Path, *, places: int, size: tuple[int, int] = (160, 120)) -> None:
    """A shard set in `folder`/shards: places of four JPEGs of noise, width x height."""
    rng = np.random.default_rng(0)
    (folder / "native" / "Dataframes").mkdir(parents=True)
    images = folder / "native" / "Images" / "Noise"
    images.mkdir(parents=True)
    rows = ["place_id,year,month,northdeg,city_id,lat,lon,panoid"]
    for place in range(places):
        for view in range(4):
            rows.append(f"{place},2020,{view + 1},0,Noise,1.5,2.5,p{place}-{view}")
            pixels = rng.integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize(size)
            picture.save(images / f"Noise_{place:07d}_2020_{view + 1:02d}_000_1.5_2.5_p{place}-{view}.jpg")
    (folder / "native" / "Dataframes" / "Noise.csv").write_text("\n".join(rows) + "\n")
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")


def write_recipe(folder: Path, case: Mapping[str, Mapping[str, Any]]) -> Path:
    """The recipe of a case: three steps, a queue, one checkpoint at the end, no evaluation."""
    recipe = {
        "name": "giant",
        "output": str(folder / "run"),
        "data": {"shards": str(folder / "shards"), "decode_threads": 1, **case["data"]},
        "model": {"weights": "random", **case["model"]},
        "memory": {"size": 1024, "start_epoch": 0},
        "engine": {"timeout_s": 1800, "stall_s": 1800, **case["engine"]},
        "trainer": {"epochs": 1, "max_steps": STEPS, "validate_every_epochs": 0, "checkpoint_every_steps": STEPS},
        "tracking": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process."""
    return int(status_mb("RssAnon", process.pid) * 2**20)


def peak_bytes(recipe: Path, ranks: int) -> list[float]:
    """Greatest memory of each rank of a training of the recipe, run to its end; of GPUs that of rank 0 alone."""
    flags = ["-m", "rerankvpr", "launch", "--nproc-per-node", str(ranks), "--", "train", str(recipe)]
    log = recipe.with_suffix(".log")
    with log.open("w") as out:
        launcher = subprocess.Popen([sys.executable, *flags], stdout=out, stderr=subprocess.STDOUT)
        peaks: dict[int, int] = {}
        while launcher.poll() is None:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                try:
                    if "trainer" in process.cmdline() or "train" in process.cmdline():
                        peaks[process.pid] = max(peaks.get(process.pid, 0), anonymous_bytes(process))
                except (psutil.Error, OSError, StopIteration):
                    continue  # it has ended
            time.sleep(POLL_S)
    if launcher.returncode:
        raise SystemExit(log.read_text()[-3000:])
    if ON_GPU:
        return [1e9 * max(logged(recipe.parent, "train/gpu_peak_gb"))]
    return sorted(map(float, peaks.values()), reverse=True)[:ranks]


def logged(folder: Path, name: str) -> list[float]:
    """A metric's values, step by step."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def main() -> None:
    """Prints measured and predicted peaks of all cases."""
    options = tyro.cli(Options)
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    earlier: dict[str, float] = json.loads(options.measured.read_text()) if options.measured else {}
    known, began = (GPU_CASES if ON_GPU else CASES | SMALL_CASES), time.monotonic()
    for name, case in known.items():
        if not name.startswith(tuple(options.cases)):
            continue
        if time.monotonic() - began > options.seconds:
            rows.append([name, "not run: out of time", "", "", ""])
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_noise(folder, places=STEPS * case["data"]["places_per_batch"])
            recipe = write_recipe(folder, case)
            planned = plan(load_recipe(recipe), Assumed(ranks=options.ranks, tflops=1.0)).memory
            predicted = planned.device_peak / FRAGMENTED - GPU_PROCESS if ON_GPU else planned.device_peak
            if earlier:
                measured, seconds = earlier[f"{name}/measured_bytes"], earlier[f"{name}/step_s"]
            else:
                measured = max(peak_bytes(recipe, options.ranks))
                seconds = statistics.median(logged(folder, "train/step_s")[1:])
        error = predicted / measured - 1
        rows.append([name, f"{measured / 1e9:.2f}", f"{predicted / 1e9:.2f}", f"{error:+.1%}", f"{seconds:.2f}"])
        figures |= {
            f"{name}/measured_bytes": measured,
            f"{name}/predicted_bytes": predicted,
            f"{name}/error": error,
            f"{name}/step_s": seconds,
        }
    columns = ["case", "measured GB", "predicted GB", "error", "s a step"]
    where = "of tensors on a GPU" if ON_GPU else "of a rank"
    print_table(f"greatest memory {where}, {options.ranks} ranks, {STEPS} steps", columns, rows)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
