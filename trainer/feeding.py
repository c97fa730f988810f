"""What keeps the ranks of a node fed with photographs: cores that decode, bytes that are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from configs.node import GPUS, IMAGES_PER_GPU_S, MORE_DECODING
from configs.schema import Recipe
from data_pipeline.decode_cost import EXAMPLE_SIZE, example_jpegs, images_per_core_second
from data_pipeline.mixture import PlaceMixture
from data_pipeline.storage import RangeReader, is_remote

FULL_NODE_IMAGES_S = GPUS * IMAGES_PER_GPU_S
_SAMPLED_PLACES = 8


@dataclass(frozen=True)
class Feeding:
    """Images that a rank takes and a core decodes in a second, bytes of an image, and what was decoded to find out."""

    rank_images_s: float | None  # None where it is not known how long a step takes
    core_images_s: float
    image_bytes: float
    measured_on: str

    def cores(self, images_s: float) -> float:
        """Cores that decode so many images a second."""
        return images_s / self.core_images_s

    def gb_s(self, images_s: float) -> float:
        """GB (10^9 bytes) of photographs in a second for so many images a second."""
        return images_s * self.image_bytes / 1e9

    def figures(self, ranks: int) -> dict[str, float]:
        """Flat, for --json: a node with so many ranks, and a full one."""
        out = {
            "feeding/ranks_of_node": float(ranks),
            "feeding/core_images_s": self.core_images_s,
            "feeding/full_node_images_s": FULL_NODE_IMAGES_S,
            "feeding/full_node_cores": self.cores(FULL_NODE_IMAGES_S),
            "feeding/full_node_gb_s": self.gb_s(FULL_NODE_IMAGES_S),
        }
        if self.rank_images_s is None:
            return out
        images_s = ranks * self.rank_images_s
        own = {"images_s": images_s, "cores": self.cores(images_s), "gb_s": self.gb_s(images_s)}
        return out | {f"feeding/{name}": value for name, value in own.items()}


def find_feeding(recipe: Recipe, rank_images_s: float | None, places: PlaceMixture | None) -> Feeding:
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
    """What a node with so many ranks needs, and a full one, a line each.

    With a warning if this machine is to be such a node, as far as is known how much its ranks take, and has too few
    cores.
    """

    def line(who: str, images_s: float) -> str:
        gb_s = feeding.gb_s(images_s)
        if recipe.data.decode == "nvjpeg":
            return f"feeding: {who} {images_s:,.0f} images/s, which its GPUs decode: {gb_s:.2f} GB/s of photographs"
        return (
            f"feeding: {who} {images_s:,.0f} images/s: {feeding.cores(images_s):.1f} cores that decode "
            f"{feeding.core_images_s:,.0f} images/s each ({feeding.measured_on}), {gb_s:.2f} GB/s"
        )

    if feeding.rank_images_s is not None:
        images_s = ranks * feeding.rank_images_s
        yield line(f"{ranks} rank(s) of a node take", images_s)
        here = len(os.sched_getaffinity(0))
        if is_this_machine and recipe.data.decode == "cpu" and feeding.cores(images_s) > here:
            yield f"feeding: this machine has {here} core(s) for them, so training waits for data; {MORE_DECODING}"
    yield line(f"{GPUS} GPUs of a node at {IMAGES_PER_GPU_S:,.0f} images/s each take", FULL_NODE_IMAGES_S)


def stream_line(recipe: Recipe, ranks: int, shard_bytes: float) -> str:
    """What `data.access stream` reads in an epoch over so many ranks; a lane is read by each rank that it feeds."""
    data = recipe.data
    share, of_lane = data.places_per_batch // ranks, data.places_per_batch // data.stream_lanes
    reads = sum(-(-(rank + 1) * share // of_lane) - rank * share // of_lane for rank in range(ranks))
    times = reads / data.stream_lanes
    size = "" if shard_bytes == float("inf") else f", {times * shard_bytes / 1e9:,.2f} GB per epoch"
    hint = (
        f"; make data.stream_lanes a multiple of {ranks} ranks to read it once"
        if times > 1 and data.places_per_batch % ranks == 0
        else ""
    )
    return f"streams: each byte of the tars is read {times:.2f} times over all ranks{size}{hint}"
