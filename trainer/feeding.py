"""What keeps the ranks of a node fed with photographs: cores that decode, bytes that are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from configs.schema import Recipe
from data_pipeline.decode_cost import EXAMPLE_SIZE, example_jpegs, images_per_core_second
from data_pipeline.mixture import PlaceMixture
from data_pipeline.storage import RangeReader, is_remote

RANKS_OF_A_NODE = 8
_SAMPLED_PLACES = 8


@dataclass(frozen=True)
class Feeding:
    """Images that a rank takes and a core decodes in a second, bytes of an image, and what was decoded to find out."""

    rank_images_s: float
    core_images_s: float
    image_bytes: float
    measured_on: str

    def cores(self, ranks: int) -> float:
        """Cores that decode for so many ranks."""
        return ranks * self.rank_images_s / self.core_images_s

    def gb_s(self, ranks: int) -> float:
        """GB (10^9 bytes) of photographs in a second for so many ranks."""
        return ranks * self.rank_images_s * self.image_bytes / 1e9

    def figures(self, ranks: int) -> dict[str, float]:
        """Flat, for --json, of a node with so many ranks."""
        return {
            "feeding/ranks_of_node": float(ranks),
            "feeding/images_s": ranks * self.rank_images_s,
            "feeding/core_images_s": self.core_images_s,
            "feeding/cores": self.cores(ranks),
            "feeding/gb_s": self.gb_s(ranks),
        }


def find_feeding(recipe: Recipe, rank_images_s: float, places: PlaceMixture | None) -> Feeding:
    """What a recipe's ranks take, if each takes so many images a second; decoding is measured in a moment.

    Photographs are those of `places` if they are on this machine, else some as large as GSV-Cities'.
    """
    photographs, measured_on = _sample(places), "photographs of the shard set"
    if not photographs:
        photographs, measured_on = example_jpegs(), f"noise of {EXAMPLE_SIZE[0]} x {EXAMPLE_SIZE[1]} pixels"
    num_bytes = float(np.mean([len(jpeg) for jpeg in photographs]))
    rate = images_per_core_second(photographs, recipe.data.image_size, recipe.data.interpolation)
    return Feeding(rank_images_s, rate, num_bytes, measured_on)


def _sample(places: PlaceMixture | None) -> list[bytes]:
    """All photographs of some places from all over the sets; none if a tar of theirs is not here."""
    if places is None or any(is_remote(index.location) for index in places.sets):
        return []
    reader, found = RangeReader(), []
    for place in np.linspace(0, places.num_places - 1, _SAMPLED_PLACES).astype(int).tolist():
        where = places.place_range(place)
        try:
            data = reader.read(where.location, where.start, where.length)
        except OSError:
            return []
        found += [data[at : at + size] for at, size in zip(where.offsets.tolist(), where.sizes.tolist(), strict=True)]
    return found


def feeding_lines(recipe: Recipe, feeding: Feeding, ranks: int, *, is_this_machine: bool) -> Iterator[str]:
    """What a node with so many ranks needs, a line each; a warning if this machine is one and has too few cores."""
    if recipe.data.decode == "nvjpeg":
        yield (
            f"feeding: {ranks} rank(s) of a node take {ranks * feeding.rank_images_s:,.0f} images/s, which its GPUs "
            f"decode: {feeding.gb_s(ranks):.2f} GB/s of photographs"
        )
        return
    cores, gb_s = feeding.cores(ranks), feeding.gb_s(ranks)
    yield (
        f"feeding: {ranks} rank(s) of a node take {ranks * feeding.rank_images_s:,.0f} images/s: {cores:.1f} cores "
        f"that decode {feeding.core_images_s:,.0f} images/s each ({feeding.measured_on}), {gb_s:.2f} GB/s"
    )
    here = len(os.sched_getaffinity(0))
    if is_this_machine and cores > here:
        yield f"feeding: this machine has {here} core(s) for them, so training waits for data; {REMEDY}"


REMEDY = (
    "ask for more cores (--cpus-per-task), write smaller photographs (`rerankvpr shard --max-side`), or let the GPUs "
    "decode (data.decode nvjpeg)"
)


def stream_line(recipe: Recipe, ranks: int, shard_bytes: float) -> str:
    """What `data.access stream` reads in an epoch over so many ranks; a lane is read by each rank that it feeds."""
    data = recipe.data
    share, of_lane = data.places_per_batch // ranks, data.places_per_batch // data.stream_lanes
    reads = sum(-(-(rank + 1) * share // of_lane) - rank * share // of_lane for rank in range(ranks))
    times = reads / data.stream_lanes
    size = "" if shard_bytes == float("inf") else f", {times * shard_bytes / 1e9:,.2f} GB an epoch"
    hint = (
        f"; make data.stream_lanes a multiple of {ranks} ranks to read it once"
        if times > 1 and data.places_per_batch % ranks == 0
        else ""
    )
    return f"streams: each byte of the tars is read {times:.2f} times over all ranks{size}{hint}"
