"""Training data: which shards, how a batch is composed, how its images are prepared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.image_size import ImageSize
from configs.schema.section import NonNegative, Positive, Section

NO_SET = "data/shards"  # where nothing else is said


class DataConfig(Section):
    """Training data: which shards, how a batch is composed, how its images are prepared."""

    shards: str = Field(
        NO_SET, description="Shard set: the folder that holds index.parquet, or its URL (https://, s3://)."
    )
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Further shard sets, and how often an epoch sees their places: 0.5 half of them, 2 all twice.",
    )
    sets: dict[str, str] = Field(
        default_factory=dict,
        description="composition sets: shard sets by name (gsv data/gsv msls s3://bucket/msls), in the place of "
        "data.shards.",
    )
    set_places: dict[str, Positive] = Field(
        default_factory=dict,
        description="composition sets: places of each set in a batch, by its name; empty: places_per_batch in even "
        "parts.",
    )
    sub_batch: Literal["city", "mixed"] = Field(
        "city", description="composition sets: a set's part of a batch comes from one city of it, or from all (mixed)."
    )
    places_per_batch: Positive = Field(
        64, description="P, places in a global batch (over all ranks; in RerankVPR's code of each process)."
    )
    images_per_place: Annotated[int, Field(ge=2)] = Field(4, description="K, views drawn of each place.")
    composition: Literal["city", "mixed", "sets"] = Field(
        "city",
        description="city: a batch comes from one city (GSV-Cities' recipe, harder negatives); mixed: from all; sets: "
        "a part from each of data.sets, with a loss of its own (MegaLoc's).",
    )
    repeat: dict[str, Positive] = Field(
        default_factory=dict, description="Times that each place of a city is seen in an epoch, where not once."
    )
    hard_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of the steps whose places are alike, chosen by descriptors of the network as it is; 0 is "
        "off.",
    )
    hard_every_steps: NonNegative = Field(
        0, description="Steps of an epoch after which hard places are chosen anew; 0 chooses once per epoch."
    )
    hard_min_m: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Least distance in metres between places of a hard step (needs coordinates); 0 is any."
    )
    hard_pool: Annotated[float, Field(ge=1)] = Field(
        1.5,
        description="Places encoded for each place of a hard step, at most all: more are more alike, and cost more.",
    )
    hard_cliques: Positive = Field(
        1, description="Groups of alike places that make a hard step; 1: all P places are alike."
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the places that training never sees and that benchmark held_out is made of (at most "
        "1,000), drawn by the seed.",
    )
    fit: bool = Field(
        False,
        description="Lower P, K, memory.size and eval.recall_at to what the shard set has places and views for, and "
        "say so.",
    )
    image_size: ImageSize = Field(
        224,
        description="Side in pixels of the square that images are resized to, or height and width ([322, 434]); "
        "multiples of the patch.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="How images are resized; the field uses both."
    )
    augmentation: Literal["randaugment", "none"] = Field("randaugment", description="Augmentation of training images.")
    augment_ops: NonNegative = Field(3, description="RandAugment: operations applied to an image.")
    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(15, description="RandAugment: strength, 0 to 30.")
    decode: Literal["cpu", "nvjpeg"] = Field(
        "cpu", description="cpu: libjpeg-turbo in threads; nvjpeg: decoded and resized on the rank's NVIDIA GPU."
    )
    decode_threads: NonNegative = Field(
        2, description="Threads a rank decodes JPEGs with; 0 decodes in the training thread."
    )
    prefetch_batches: Positive = Field(2, description="Batches decoded ahead of the training step.")
    access: Literal["ranges", "stream"] = Field(
        "ranges",
        description="ranges: each place is read alone, in any order; stream: whole tars one after the other, their "
        "places mixed in a buffer.",
    )
    stream_buffer_places: Positive = Field(
        2048, description="Streams: places that all ranks together hold to mix, of what is read; more mix better."
    )
    stream_lanes: Positive = Field(
        4,
        description="Streams: tars read beside each other, each lane giving the same part of every batch; a divisor of "
        "P, best a multiple of the ranks.",
    )
    read_threads: Positive = Field(
        8, description="Places a rank reads at a time, ahead of the decoder; more hide the latency of a far server."
    )
    read_ahead_mb: NonNegative = Field(64, description="MB (2^20 bytes) of shards a rank reads ahead of the decoder.")
    cache: Path | None = Field(
        None, description="Folder that keeps what was read over a network; ranks of a machine share it."
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(100.0, description="Bound of data.cache in GB (2^30 bytes).")
    index_cache: Path | None = Field(
        None,
        description="Folder for the copy of a large index that the ranks of a node map together; by default in the "
        "system's temporary folder.",
    )
    remote_retry_s: Annotated[float, Field(ge=0)] = Field(
        120.0, description="Seconds that a failing read over a network is tried again before the run stops."
    )
    max_bad_images: NonNegative = Field(
        100, description="Unreadable images that are replaced by another view of the same place before the run stops."
    )

    @property
    def locations(self) -> dict[str, str]:
        """The shard sets that are read, in order, by name: that of data.sets, or the location itself."""
        if self.composition == "sets":
            return dict(self.sets)
        return {location: location for location in (self.shards, *self.mix)}

    @property
    def places_of_sets(self) -> dict[str, int]:
        """Places of each of data.sets in a global batch; empty for other compositions."""
        if self.composition != "sets":
            return {}
        even = self.places_per_batch // len(self.sets)
        return {name: self.set_places.get(name, even) for name in self.sets}

    @model_validator(mode="after")
    def _sets_make_batches(self) -> DataConfig:
        if self.composition != "sets":
            for key in ("sets", "set_places"):
                if getattr(self, key):
                    raise ValueError(f"{key} is for composition sets, and composition is {self.composition}")
            return self
        faults = []
        if not self.sets:
            faults.append("composition sets needs sets, shard sets by name: --data.sets gsv data/gsv msls data/msls")
        if bad := [name for name in self.sets if not re.fullmatch(r"[\w.-]+", name)]:
            faults.append(f"sets: {bad[0]!r} is not a plain name; letters, digits, '.', '_' and '-' are")
        if self.shards != NO_SET:
            faults.append(
                f"shards {self.shards} is not read with composition sets; name it in sets, and leave shards out or at "
                f"{NO_SET}"
            )
        for key, instead in (("mix", "sets"), ("repeat", "set_places"), ("fit", "places_per_batch")):
            if getattr(self, key):
                faults.append(f"{key} does not go with composition sets; use {instead}")
        faults += self._set_places_faults() if self.sets else []
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _set_places_faults(self) -> list[str]:
        if not self.set_places:
            if self.places_per_batch % len(self.sets):
                return [
                    f"places_per_batch {self.places_per_batch} is not divisible by {len(self.sets)} sets; say how many "
                    "places each has in set_places"
                ]
            return []
        if odd := sorted(set(self.sets) ^ set(self.set_places)):
            return [f"set_places and sets must name the same sets, and {odd[0]} is in one alone"]
        if (total := sum(self.set_places.values())) != self.places_per_batch:
            return [f"set_places add up to {total}, places_per_batch is {self.places_per_batch}"]
        return []

    @model_validator(mode="after")
    def _streams_agree(self) -> DataConfig:
        if self.access == "ranges":
            return self
        if self.composition != "mixed":
            raise ValueError(
                f"data.access stream mixes the places of the tars that it reads; data.composition {self.composition} "
                "needs data.access ranges, else use mixed"
            )
        if self.places_per_batch % self.stream_lanes:
            lanes = max(n for n in range(1, self.stream_lanes) if self.places_per_batch % n == 0)
            raise ValueError(
                f"data.stream_lanes {self.stream_lanes} does not divide data.places_per_batch {self.places_per_batch}; "
                f"use {lanes}"
            )
        if more := [name for name, weight in self.mix.items() if weight > 1]:
            raise ValueError(
                f"data.mix: weight {self.mix[more[0]]:g} of {more[0]}: data.access stream reads each tar once in an "
                "epoch; use 1 or less, or data.access ranges"
            )
        if self.hard_share:
            raise ValueError(
                f"data.hard_share {self.hard_share:g} chooses places from all tars; it needs data.access ranges, else "
                "use 0"
            )
        if self.cache:
            raise ValueError(
                "data.cache keeps places that are read alone; data.access stream reads past it: leave one of them out"
            )
        return self
