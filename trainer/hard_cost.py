"""What hard places (`data.hard_share`) cost beside the steps: memory while they are chosen, and time of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from configs.schema import Recipe
from trainer.cliques import CELL_ROWS
from trainer.flops import forward_flops, head_flops

NUMBERS = 512  # of a descriptor that are kept; longer ones are projected to as many
LEAST_CHUNKS = 16  # that places are encoded in, so that few ranks of few places wait
FP16, FP32 = 2, 4
CELLS = 2.5  # float32 copies of a cell at the peak: it, the one before it, and the rows that are still free


def num_candidates(recipe: Recipe, steps_per_epoch: int | None) -> int:
    """Most places that are encoded at a time: those of one window of an epoch; 0 if none, or if that is not known."""
    data, steps = recipe.data, steps_per_epoch or 0
    windows = [number for number in (data.hard_every_steps, steps) if number]
    if not data.hard_share or not windows:
        return 0
    pool = round(data.hard_pool * math.ceil(data.hard_share * min(windows)) * data.places_per_batch)
    return min(pool, (steps + 1) * data.places_per_batch) if steps else pool  # some are left over


def composing_bytes(candidates: int, descriptor: int) -> int:
    """Bytes that rank 0 holds on the host while it composes: descriptors in float16, and cells of them in float32."""
    numbers = min(descriptor, NUMBERS)
    return round(candidates * numbers * FP16 + CELLS * min(candidates, CELL_ROWS) * numbers * FP32)


def chunk_images(recipe: Recipe, candidates: int) -> int:
    """Images of a forward pass that encodes candidates."""
    return min(recipe.eval.batch_size, math.ceil(candidates / LEAST_CHUNKS))


def hard_lines(
    recipe: Recipe, ranks: int, candidates: int, steps_per_epoch: int | None, step_s: float | None, tflops: float | None
) -> Iterator[str]:
    """A line on how many places are encoded, how often and, where a step's seconds are known, for how long."""
    data = recipe.data
    if not data.hard_share:
        return
    if not candidates:
        yield "hard places: how many are encoded is not known without the shard index"
        return
    every = data.hard_every_steps or steps_per_epoch or 0
    line = f"hard places: at most {candidates:,} encoded every {every} steps, one view of each, forward only"
    if step_s and tflops:
        flops = forward_flops(recipe.model.spec, data.image_size) + head_flops(recipe)
        seconds = math.ceil(candidates / ranks) * flops / (tflops * 1e12)
        share = seconds / (every * step_s + seconds)
        line += f": {seconds:.2f} s, {share:.1%} of the time; composing them on rank 0 comes on top"
    yield line
