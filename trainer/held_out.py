"""The benchmark that a training makes of the places it holds out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from configs.ranks import on_all_ranks
from configs.schema import Recipe
from data_pipeline.held_out import held_out_folder, read_held_out, write_held_out
from data_pipeline.mixture import PlaceMixture
from data_pipeline.plan import Int64
from data_pipeline.storage import RangeReader
from eval.benchmarks.benchmark import Benchmark, make_benchmark
from eval.scratch import hosts_that_miss
from trainer.process_group import Rank

NAME = "held_out"


def held_out_benchmark(
    recipe: Recipe, places: PlaceMixture, held_out: Int64, reader: RangeReader, rank: Rank
) -> Benchmark:
    """One view of each held-out place against their other views and trained places; every rank must call this.

    Rank 0 writes the photographs to the recipe's output, which all nodes see. Raises what it raises on every rank, and
    ValueError naming a rank that does not see them.
    """
    folder = held_out_folder(recipe.output, places, held_out, seed=recipe.seed)
    with on_all_ranks():
        if rank.is_main:
            write_held_out(folder, places, held_out, reader, seed=recipe.seed)
    if missing := hosts_that_miss(folder):
        raise ValueError(f"{missing[0]} does not see rank 0's {folder}; use an output that all nodes mount")
    with on_all_ranks():
        return _benchmark(folder, recipe.data.held_out)


def _benchmark(folder: Path, share: float) -> Benchmark:
    found = read_held_out(folder)
    positives = [np.flatnonzero(found.database_places == place) for place in found.query_places]
    protocol = f"one view of each of {len(positives)} held-out places ({share:.0%})"
    return make_benchmark(NAME, protocol, found.database, found.queries, positives)
