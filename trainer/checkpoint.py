"""Checkpoints: whole or not at all.

`checkpoints/step-<n>/` holds `model.safetensors`, the optimizer's state, the queue, the position in the epoch plan and
the recipe, and, written last, a manifest with the size and digest of each file. It is written under a temporary name
and renamed; `latest` and `best` are one-line files replaced by rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from configs.load import recipe_text
from configs.schema import Recipe
from memory.drift import DriftProbe
from memory.queue import MemoryQueue
from trainer.optimizer_state import load_optimizer, save_optimizer

MANIFEST = "manifest.json"
FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says which and why."""


@dataclass
class Progress:
    """Where a training stands; everything here is in `state.json`."""

    step: int = 0  # position in the plan: global steps begun so far, over all epochs
    skipped_steps: int = 0  # of these, steps without an update because of a non-finite loss
    bad_images: int = 0
    evals_since_best: int = 0
    mlflow_run_id: str | None = None
    before: list[dict[str, Any]] = field(default_factory=list)  # results of the untrained model


def step_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path, engine: Any, queue: MemoryQueue, drift: DriftProbe | None, progress: Progress, recipe: Recipe
) -> Path:
    """Writes `folder/step-<n>` from all ranks and points `latest` at it. Every rank must call this."""
    main = dist.get_rank() == 0
    final = folder / step_name(progress.step)
    partial = folder / f".{final.name}.partial"
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_optimizer(engine, partial)
    if main or queue.placement == "sharded":
        _save_buffers(queue, partial / f"queue-{queue.rank:05d}-of-{queue.num_shards:05d}.safetensors")
    dist.barrier()
    if main:
        weights = {name: p.detach().float().cpu().contiguous() for name, p in engine.module.state_dict().items()}
        save_file(weights, partial / "model.safetensors")
        if drift:
            _save_buffers(drift, partial / "drift.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(progress), indent=1))
        (partial / "recipe.yaml").write_text(recipe_text(recipe))
        files = {str(f.relative_to(partial)): f for f in sorted(partial.rglob("*")) if f.is_file()}
        digests = {name: {"bytes": f.stat().st_size, "sha256": _sync_and_digest(f)} for name, f in files.items()}
        manifest = {"format": FORMAT, "step": progress.step, "world_size": dist.get_world_size(), "files": digests}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync_and_digest(partial / MANIFEST)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        point(folder / "latest", final)
    dist.barrier()
    return final


def _save_buffers(module: torch.nn.Module, file: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}, file)


def _sync_and_digest(file: Path) -> str:
    """sha256 of a file whose bytes have reached the disk."""
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        while block := stream.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def point(link: Path, checkpoint: Path, recall: float | None = None) -> None:
    """Makes the one-line file `link` name `checkpoint` (and the recall it is kept for), atomically."""
    partial = link.with_suffix(".partial")
    partial.write_text(checkpoint.name + ("\n" if recall is None else f" {recall}\n"))
    partial.replace(link)


def pointed(link: Path) -> Path | None:
    """The checkpoint that a `latest` or `best` file names."""
    return link.parent / link.read_text().split()[0] if link.is_file() else None


def best_recall(folder: Path) -> float:
    """The recall that `best` is kept for; -1 where there is none yet."""
    link = folder / "best"
    return float(link.read_text().split()[1]) if link.is_file() else -1.0


def faults(checkpoint: Path) -> list[str]:
    """What differs between a checkpoint and its manifest; empty if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return [f"{checkpoint} has no {MANIFEST}: it is no checkpoint, or was cut off while it was written"]
    except ValueError:
        return [f"{checkpoint / MANIFEST} is not valid JSON"]
    if manifest.get("format") != FORMAT:
        return [f"{checkpoint} has format {manifest.get('format')}; this version reads {FORMAT}"]
    found = []
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            found.append(f"{file} has {file.stat().st_size} bytes, expected {expected['bytes']}")
        elif _sync_and_digest(file) != expected["sha256"]:
            found.append(f"{file} differs from its digest")
    return found


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, what a `latest` or `best` file names, or a run's best, else newest.

    Raises CheckpointError if there is none or it is damaged.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    target = pointed(path) or pointed(folder / "best") or pointed(folder / "latest") or folder
    damage = faults(target)
    if damage:
        raise CheckpointError(damage[0])
    return target


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and what was wrong with the newer ones."""
    notes: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        damage = faults(candidate)
        if not damage:
            return candidate, notes
        notes.append(damage[0])
    return None, notes


def load_checkpoint(
    checkpoint: Path, engine: Any, queue: MemoryQueue, drift: DriftProbe | None, recipe: Recipe
) -> Progress:
    """Restores engine and queue on every rank, at any world size and ZeRO stage, and returns the position."""
    for key, ours, theirs in _differences(recipe, checkpoint):
        raise CheckpointError(f"{checkpoint} was trained with {key} {theirs}, this recipe has {ours}; they must agree")
    side = recipe.data.image_size
    blank = torch.zeros(1, 3, side, side, device=next(engine.module.parameters()).device)
    load_optimizer(engine, checkpoint, load_file(checkpoint / "model.safetensors"), lambda: engine(blank))
    queue.load_shards(load_file(file) for file in sorted(checkpoint.glob("queue-*.safetensors")))
    if drift and (checkpoint / "drift.safetensors").exists():
        drift.load_state_dict(load_file(checkpoint / "drift.safetensors"))
    return Progress(**json.loads((checkpoint / "state.json").read_text()))


def _differences(recipe: Recipe, checkpoint: Path) -> list[tuple[str, Any, Any]]:
    """Keys that decide what the stored state means, where recipe and checkpoint differ."""
    import yaml

    stored = Recipe.model_validate(yaml.safe_load((checkpoint / "recipe.yaml").read_text())).as_flat()
    fixed = (
        "seed",
        "data.places_per_batch",
        "data.images_per_place",
        "data.composition",
        "data.repeat",
        "model.backbone",
        "model.aggregator",
        "model.finetune_last_n_blocks",
        "memory.size",
        "engine.precision",
        "optim.name",
    )
    return [
        (key, value, stored[key]) for key, value in recipe.as_flat().items() if key in fixed and value != stored[key]
    ]


def load_model_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into a model built from its recipe."""
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints and the best one, and left-over partial ones."""
    kept = {*sorted(folder.glob("step-*"))[-keep_last:], pointed(folder / "best")}
    for old in {*folder.glob("step-*"), *folder.glob(".step-*.partial")} - kept:
        shutil.rmtree(old)
