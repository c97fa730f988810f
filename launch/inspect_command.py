"""`rerankvpr inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from configs.flags import parse_flags
from configs.secrets import without_secrets

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex
    from data_pipeline.storage import RangeReader

SHOWN = 20


@dataclass(frozen=True)
class InspectCommand:
    """Shows what a shard set holds; with --out also as pictures, and how an epoch goes through it."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Folder or URL with shards/ and index.parquet."""
    out: Path | None = None
    """Folder for contact_sheet.png and map.png."""
    places: int = 12
    """Places on the contact sheet."""
    views: int = 8
    """Views of each place on the contact sheet."""
    seed: int = 0
    """Seed that draws the places of the contact sheet, and seed of the plan."""
    plan: Path | None = None
    """Parquet file that the plan of an epoch is written to: a row for each place of each step."""
    epoch: int = 0
    """The planned epoch."""
    places_per_batch: int = 64
    """Places in a global batch of the plan."""
    images_per_place: int = 4
    """Views drawn of each place of the plan."""
    composition: Literal["city", "mixed"] = "city"
    """Composition of the plan's batches."""
    remote_retry_s: float = 10.0
    """Seconds that a failing read over http or s3 is tried again."""

    def __post_init__(self) -> None:
        if not self.remote_retry_s >= 0:
            raise ValueError(f"--remote-retry-s {self.remote_retry_s:g}: expected 0 s or more")


def main(argv: list[str]) -> int:
    """Describes a shard set."""
    command = parse_flags(InspectCommand, argv, prog="rerankvpr inspect")
    # matplotlib and pyarrow take a second that help need not wait for.
    from data_pipeline.folder_lock import LOCK, FolderLock
    from data_pipeline.index import read_index
    from data_pipeline.storage import RangeReader

    if command.places < 1 or command.views < 1:
        raise ValueError(f"a contact sheet of {command.places} places x {command.views} views; use 1 or more of each")
    console, reader = Console(), RangeReader(retry_s=command.remote_retry_s)
    index = read_index(command.shards, reader)
    _describe(console, index)
    if command.out:
        with FolderLock(command.out, "rerankvpr inspect", name=f"{LOCK}.inspect"):
            _draw(console, command, index, reader)
    if command.plan:
        from data_pipeline.plan import Batching, plan_epoch

        plan = plan_epoch(
            index.place_city,
            index.num_views,
            Batching(
                places_per_batch=command.places_per_batch,
                images_per_place=command.images_per_place,
                composition=command.composition,
            ),
            seed=command.seed,
            epoch=command.epoch,
        )
        plan.write(command.plan)
        console.print(
            f"plan of epoch {command.epoch}: {command.plan}, {plan.num_steps:,} steps of {command.places_per_batch} "
            f"places x {command.images_per_place} views",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _draw(console: Console, command: InspectCommand, index: ShardIndex, reader: RangeReader) -> None:
    from data_pipeline.overview import draw_contact_sheet, draw_map

    assert command.out is not None
    sheet, chart = command.out / "contact_sheet.png", command.out / "map.png"
    draw_contact_sheet(index, reader, sheet, places=command.places, views=command.views, seed=command.seed)
    console.print(f"contact sheet: {sheet}", highlight=False, soft_wrap=True)
    said = f"map: {chart}" if draw_map(index, chart) else "map: none, no place has coordinates"
    console.print(said, highlight=False, soft_wrap=True)


def _describe(console: Console, index: ShardIndex) -> None:
    from data_pipeline.overview import overview

    seen, said = overview(index), index.metadata
    counts = f"{seen.places:,} places, {seen.images:,} images, {seen.shards:,} tars, {seen.shard_bytes / 2**20:,.1f} MB"
    table = Table(title=f"{without_secrets(index.location, is_address=True)}: {counts}", title_justify="left")
    table.add_column("city")
    for column in ("places", "images", "years"):
        table.add_column(column, justify="right")
    for city in seen.cities[:SHOWN]:
        table.add_row(city.name, f"{city.places:,}", f"{city.images:,}", city.years)
    if len(seen.cities) > SHOWN:
        table.add_row(f"and {len(seen.cities) - SHOWN:,} more", "", "", "")
    console.print(table)
    console.print(f"{'digest':<18}{index.digest}", highlight=False)
    for what, (least, median, most) in {
        "images per place": seen.images_per_place,
        "width, pixels": seen.widths,
        "height, pixels": seen.heights,
        "bytes per image": seen.image_bytes,
    }.items():
        console.print(f"{what:<18}{least:,} to {most:,}, median {median:,g}", highlight=False)
    console.print(
        f"left out          {said.places_left_out:,} places with too few images ({said.images_left_out:,} images), "
        f"{len(said.bad):,} bad images",
        highlight=False,
        soft_wrap=True,
    )
    for bad in said.bad[:SHOWN]:
        console.print(f"  {bad}", highlight=False, soft_wrap=True)
