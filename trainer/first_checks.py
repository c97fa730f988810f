"""What of a recipe is wrong, all of it in one message, found before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import Recipe
from data_pipeline.mixture import EpochPlans, PlaceMixture, read_mixture
from data_pipeline.place_positions import points_for
from data_pipeline.storage import StorageError, is_remote
from eval.benchmarks.load import load_benchmarks
from trainer.checkpoint_folder import find_checkpoint, newest_valid


@dataclass
class Faults:
    """Lines on what is wrong, gathered over several checks; `absent` are those on what this machine does not have."""

    lines: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Takes what the block raises as a fault, or as absent if a file or a server is."""
        try:
            yield
        except (FileNotFoundError, StorageError) as error:
            self.absent.append(str(error))
        except ValueError as error:
            self.lines += [line for line in str(error).splitlines() if line not in self.lines]

    def of(self, check: Callable[[], Any]) -> Any:
        """What `check` returns, None if it raises; see `gather`."""
        with self.gather():
            return check()
        return None

    def raise_all(self) -> None:
        """Raises ValueError with a line for each fault, if there are any."""
        if self.lines:
            raise ValueError("\n".join(self.lines))


def images_per_rank(recipe: Recipe, world_size: int) -> int:
    """Images that each rank encodes in a step. Raises ValueError if they are not equally many, or too few."""
    places, chunks = recipe.data.places_per_batch, recipe.engine.encode_chunks
    of_sets = recipe.data.places_of_sets
    multiple = world_size * max(1, len(of_sets))
    low = max(multiple, places // multiple * multiple)
    if any(number % world_size for number in of_sets.values()):
        parts = ", ".join(f"{name} {number}" for name, number in of_sets.items())
        raise ValueError(
            f"data.sets: a batch takes {parts} places, which {world_size} ranks cannot share evenly; each must be a "
            f"multiple of {world_size}; nearest data.places_per_batch of even parts: {low} or {low + multiple}"
        )
    if places % world_size:
        raise ValueError(
            f"data.places_per_batch {places} is not divisible by {world_size} ranks; nearest: {low} or {low + multiple}"
        )
    images = places // world_size * recipe.data.images_per_place
    if chunks > images:
        raise ValueError(
            f"engine.encode_chunks {chunks} is more than the {images} images of a rank; it counts the "
            "chunks that these are encoded in"
        )
    return images


def check_data(
    recipe: Recipe, world_size: int | None, faults: Faults, *, resume: bool, checkpoint: Path | None = None
) -> tuple[PlaceMixture | None, EpochPlans | None]:
    """Gathers what is wrong with batch, shards, benchmarks and output; the shards and plans if they are right.

    Needs neither torch nor a process group.
    """
    if world_size:
        faults.of(lambda: images_per_rank(recipe, world_size))
    places: PlaceMixture | None = faults.of(lambda: read_mixture(recipe.data))
    plans = None
    if places:
        mixture = places
        plans = faults.of(lambda: EpochPlans(mixture, recipe.data, seed=recipe.seed))
        if metres := recipe.memory.min_negative_m:
            faults.of(lambda: points_for(mixture.sets, "memory.min_negative_m", metres))
    for spec in recipe.eval.benchmarks:
        faults.of(partial(load_benchmarks, [spec], recipe.eval.data_root))
    faults.of(lambda: _check_output(recipe, resume=resume, checkpoint=checkpoint))
    return places, plans


def _check_output(recipe: Recipe, *, resume: bool, checkpoint: Path | None) -> None:
    found = find_checkpoint(checkpoint) if checkpoint else newest_valid(recipe.output / "checkpoints")[0]
    if found and not resume:
        raise ValueError(
            f"{recipe.output} already holds a training (up to {found.name}); add --resume or change --output"
        )


def check_start(recipe: Recipe, world_size: int, *, resume: bool) -> None:
    """Raises ValueError, a line for each fault, for a training on this machine that would end before its first step.

    Nothing is asked of servers. Raises FileNotFoundError where only files are missing.
    """
    if any(is_remote(location) for location in recipe.data.locations.values()):
        return
    faults = Faults()
    check_data(recipe, world_size, faults, resume=resume)
    weights = Path(recipe.model.weights)
    if recipe.model.weights not in ("timm", "random") and not weights.exists():
        faults.absent.append(f"weights file {weights} does not exist")
    if not faults.lines and faults.absent:
        raise FileNotFoundError("\n".join(faults.absent))
    faults.lines += faults.absent
    faults.raise_all()
