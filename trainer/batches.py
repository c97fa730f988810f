"""The global batches of a training, in the plan's order, from any step on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from configs.image_size import height_width
from configs.schema import DataConfig, Recipe
from configs.traced import part
from data_pipeline.augment import Drawn, image_seeds, randaugment_of
from data_pipeline.copies import CopyStream
from data_pipeline.loader import Draw, PlaceBatch, PlaceLoader, build_reader
from data_pipeline.mixture import EpochPlans, read_mixture
from data_pipeline.plan import EpochPlan
from trainer.process_group import Rank
from trainer.watchdog import Watchdog

Composing = Callable[[int, int], tuple[EpochPlan, int]]  # of an epoch and a step of it: the plan and where it ends


class Batches:
    """This rank's share of every batch of a training: which places and views, read and decoded ahead."""

    def __init__(self, recipe: Recipe, rank: Rank) -> None:
        """Raises what `read_mixture`, `EpochPlans` and `PlaceLoader` raise."""
        self._recipe = recipe
        reader = build_reader(recipe.data, rank=rank.rank)
        self.places = read_mixture(recipe.data, reader)
        self.reader = reader
        self.plans = EpochPlans(self.places, recipe.data, seed=recipe.seed)
        copies = CopyStream(rank.device) if rank.device.type == "cuda" else None
        self._loader = PlaceLoader(
            self.places, recipe.data, rank=rank.rank, world_size=rank.world_size, reader=reader, copies=copies
        )
        self.steps_per_epoch = self.plans.num_steps
        self.total_steps = recipe.trainer.epochs * self.steps_per_epoch
        if recipe.trainer.max_steps:
            self.total_steps = min(self.total_steps, recipe.trainer.max_steps)

    @property
    def dataset(self) -> str:
        """The digest of the shard sets and of the places held out of them."""
        return self.plans.digest

    @property
    def num_bad_images(self) -> int:
        """Distinct unreadable images met on this rank."""
        return self._loader.num_bad_images

    def spread(self, steps: int) -> Iterator[PlaceBatch]:
        """This rank's share of some batches from all over the first epoch."""
        last = self.steps_per_epoch - 1
        if self._recipe.data.access == "stream":  # where batches from all over would be nearly all tars
            yield from self.of_plan(self.plans.epoch(0), range(min(steps, last + 1)))
            return
        numbers = [round(i * last / max(1, steps - 1)) for i in range(steps)]
        yield from self.of_plan(self.plans.epoch(0), numbers)

    def read_again(self, step: int) -> str:
        """What a run that is resumed at this step reads a second time, in a line; empty where that is nothing."""
        again = self.plans.read_again(step)
        if not again or not again.places:
            return ""
        return f"streams: {again.places} places of {again.tars} tars that had been given are read again, at most"

    def streamed(self) -> str:
        """What this rank has read of whole tars, and how much of it is unused, in a line; empty where none was read."""
        counts = self._loader.streamed
        if not counts.read_bytes:
            return ""
        return (
            f"streams: this rank began {counts.tars} tars and read {counts.read_bytes / 1e9:.2f} GB, "
            f"{counts.unused_bytes / counts.read_bytes:.1%} of it unused: headers, descriptions, and places held out, "
            "not due in the epoch or of other ranks"
        )

    def of_plan(self, plan: EpochPlan, steps: Iterable[int]) -> Iterator[PlaceBatch]:
        """This rank's share of some steps of any plan, as they are read, without augmentation."""
        yield from self._loader.batches(plan, steps)

    def from_step(
        self, step: int, watchdog: Watchdog, composed: Composing | None = None
    ) -> Iterator[tuple[PlaceBatch, float]]:
        """The batch of each step from `step` (0 is the first) to the last, and the seconds that it was waited for.

        `composed` is asked for an epoch's plan at `step`, and again at the step at which that plan ends.
        """
        while step < self.total_steps:
            epoch, start = divmod(step, self.steps_per_epoch)
            draw = self._draw_of(epoch)
            plan, end = composed(epoch, start) if composed else (self.plans.epoch(epoch), self.steps_per_epoch)
            stop = min(end, start + self.total_steps - step)
            batches = iter(self._loader.batches(plan, range(start, stop), draw))
            while True:
                watchdog.enter("data", step)
                asked = time.perf_counter()
                with part("wait for data"):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch, time.perf_counter() - asked
                step += 1

    def _draw_of(self, epoch: int) -> Draw | None:
        """What draws the augmentation of an epoch's images in the loader's threads."""
        data, seed = self._recipe.data, self._recipe.seed
        return None if data.augmentation == "none" else partial(draw_augmentation, data, seed, epoch)


def draw_augmentation(
    data: DataConfig, seed: int, epoch: int, place_ids_B: torch.Tensor, views_B: torch.Tensor
) -> Drawn:
    """What the images of a batch are put through in this epoch of a recipe with this seed."""
    seeds = image_seeds(seed, epoch, place_ids_B, views_B)
    transform = randaugment_of(data.augment_ops, data.augment_magnitude)
    return transform.draw_batch(seeds, *height_width(data.image_size))
